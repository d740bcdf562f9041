"""int8 as LLM.int8() with its outlier threshold, a setting: what transformers computes under the same threshold.

The oracle gets the same rows in the same batches as the engine, because which features are outliers is decided for a
whole batch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from deployments.engine.attention_choice import _why_not
from deployments.engine.loader import LoadedModel, load
from deployments.engine.loop import Engine
from deployments.engine.messages import EngineLimits
from deployments.engine.stages import run_stages
from deployments.errors import ConfigError
from deployments.planning import plan_pool
from deployments.protocol import GenerationRequest, Sampling
from deployments.settings import PoolSettings, parse_settings
from placement import probe
from placement.hardware import Gpu
from placement.plan import Plan
from tests.contract.greedy import generated
from tests.unit.engine.tiny import IDS, llama, rows, save

OUTLIER = 6.0
PROMPTS = tuple(tuple((31 * i + 7 * j) % 251 + 2 for j in range(length)) for i, length in enumerate((9, 3, 17, 5)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of which one feature is large wherever a linear reads it."""
    path = save(tmp_path_factory.mktemp("outliers"), llama())
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("layernorm.weight"):
                weight[5] = 40.0
    model.save_pretrained(path)
    return path


def pool(**options: Any) -> PoolSettings:
    small = {"device": "cpu", "block_size": 4, "max_sequences": 16, "max_batch_tokens": 64, "max_context": 64}
    return PoolSettings.model_validate(
        small | {"quantization": "int8", "dtype": "float32", "cpu_device_memory": "20MB"} | options
    )


def limits(threshold: float) -> EngineLimits:
    return EngineLimits(64, 16, prefix_cache=False, threads=1, int8_threshold=threshold)


def served(folder: Path, threshold: float, stages: int = 1) -> tuple[LoadedModel, Plan]:
    plan, _ = plan_pool("tiny", folder, pool(int8_threshold=threshold, stages=stages))
    return load(folder, plan, device_type="cpu", limits=limits(threshold)), plan


def plain(folder: Path, threshold: float) -> PreTrainedModel:
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config).eval()


def logits(model: LoadedModel) -> torch.Tensor:
    return run_stages(model.stages, rows([(0, 17, tuple(range(5)))], tuple(range(17))), 4)


@torch.inference_mode()
def test_logits_are_those_of_transformers_with_the_threshold_and_not_without(folder: Path) -> None:
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([IDS[:17]])
    unquantised = whole(input_ids=ids, use_cache=False).logits[0]
    errors = {}
    for threshold in (0.0, OUTLIER):
        expected = plain(folder, threshold)(input_ids=ids, use_cache=False).logits[0]
        found = logits(served(folder, threshold)[0])
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
        errors[threshold] = float((found - unquantised).norm() / unquantised.norm())
    assert errors[OUTLIER] < 0.7 * errors[0.0], "outliers that are rounded with the rest cost accuracy"


@pytest.mark.parametrize("stages", [1, 2])
def test_greedy_tokens_equal_generate(folder: Path, stages: int) -> None:
    """One request at a time: the rows of a step are then those of a step of `generate()`."""
    expected = generated(plain(folder, OUTLIER), PROMPTS)
    model, plan = served(folder, OUTLIER, stages)
    assert len(plan.stages) == stages
    engine = Engine(model, plan, limits(OUTLIER))
    found = []
    for i, prompt in enumerate(PROMPTS):
        engine.submit(GenerationRequest(f"{i}", prompt, Sampling(len(expected[i]), seed=0, temperature=0.0)))
        tokens: list[int] = []
        while engine.has_work():
            tokens += [token for chunk in engine.step() for token in chunk.token_ids]
        found.append(tuple(tokens))
    engine.close()
    assert tuple(found) == expected


def test_a_threshold_is_for_int8(folder: Path) -> None:
    with pytest.raises(ConfigError, match="int8_threshold is for int8, and quantization is nf4; drop one of the two"):
        parse_settings(
            {"models": [{"name": "m", "source": "demo", "pools": [{"quantization": "nf4", "int8_threshold": 6}]}]}
        )
    with pytest.raises(ConfigError, match=r"int8_threshold is for int8, and tiny is served in nf4; drop it"):
        plan_pool("tiny", folder, pool(quantization="auto", int8_threshold=6.0))


def test_on_gpus_it_is_planned_and_run_without_graphs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "cuda_gpus", lambda: (Gpu("Toy", 4 * 10**9, speed=1),))
    settings = pool(device="cuda", dtype="bfloat16", int8_threshold=6.0)
    assert not settings.own_kernels
    (stage,) = plan_pool("tiny", folder, settings)[0].stages
    assert "graphs" not in {term.name for term in stage.reserve}
    assert "waits for the host" in str(_why_not((), limits(OUTLIER)))
    with pytest.raises(ConfigError, match="quantize_head on GPUs needs `kernels: headroom` and no int8_threshold"):
        plan_pool("tiny", folder, pool(device="cuda", dtype="bfloat16", int8_threshold=6.0, quantize_head=True))
