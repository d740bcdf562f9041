"""Models whose head is quantised too: planned to the byte, served on one stage and on two, saved for transformers.

The oracle of a head of its own is transformers told to skip nothing. A tied head's is transformers' model with the
dequantised weights as a head beside its embedding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, PreTrainedModel

from deployments.engine.loader import load, quantization_config, quantized_copy
from deployments.errors import ConfigError
from deployments.planning import plan_pool
from placement import probe
from placement.hardware import Gpu
from placement.plan import Plan
from tests.contract.families import CONFIGS
from tests.contract.greedy import LIMITS, answers, generated, make_prompts, pool, rounded, run, save

PROMPTS = make_prompts()
TIED = {"Llama": False, "GPT-2": True, "Gemma 2": True, "Qwen2": False}


def eight_bit(head: nn.Linear) -> nn.Module:
    """bitsandbytes' own, which rounds activations too."""
    linear = bitsandbytes.nn.Linear8bitLt(
        head.in_features, head.out_features, bias=False, has_fp16_weights=False, threshold=0.0
    )
    linear.load_state_dict({"weight": head.weight.detach()})
    return linear.to("cpu")


def oracle(folder: Path, plan: Plan, *, tied: bool) -> PreTrainedModel:
    config = quantization_config(plan)
    assert isinstance(config, BitsAndBytesConfig)
    if not tied:
        config.llm_int8_skip_modules = []
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config)
    head = model.get_output_embeddings()
    assert (head.weight is model.get_input_embeddings().weight) == tied
    assert (type(head) is nn.Linear) == tied
    if tied and plan.quantization == "int8":
        model.set_output_embeddings(eight_bit(head))
    elif tied:
        head.weight = nn.Parameter(
            rounded(head.weight.detach(), plan.quantization, plan.double_quant), requires_grad=False
        )
    return model


@pytest.mark.parametrize(
    ("name", "quantization", "double_quant"),
    [
        ("Llama", "nf4", True),
        ("Qwen2", "int8", False),
        ("GPT-2", "fp4", False),
        ("GPT-2", "int8", False),
        ("Gemma 2", "nf4", True),
    ],
)
def test_greedy_tokens_equal_generate(name: str, quantization: str, double_quant: bool, tmp_path: Path) -> None:
    folder = save(CONFIGS[name], tmp_path / "model")
    settings = {"quantization": quantization, "double_quant": double_quant, "quantize_head": True}
    plan, _ = plan_pool("tiny", folder, pool(**settings))
    outputs = generated(oracle(folder, plan, tied=TIED[name]), PROMPTS)
    expected = answers(outputs)
    two, _ = plan_pool("tiny", folder, pool(**settings, stages=2))
    assert len(two.stages) == 2
    for each, cache in ((plan, None), (two, None), (plan, tmp_path / "kept"), (two, tmp_path / "kept")):
        model = load(folder, each, device_type="cpu", cache_dir=cache)
        assert run(model, each, LIMITS, PROMPTS)[0] == expected
    # What was kept is a checkpoint for transformers as it is.
    config = quantization_config(plan)
    assert config is not None
    kept = AutoModelForCausalLM.from_pretrained(quantized_copy(folder, plan, config, tmp_path / "kept"))
    assert type(kept.get_output_embeddings()) is not nn.Linear
    assert generated(kept, PROMPTS) == outputs


@pytest.mark.parametrize("tied", [False, True])
def test_the_plan_counts_the_copy_and_the_embedding(tied: bool, tmp_path: Path) -> None:
    config = LlamaConfig(**{**CONFIGS["Llama"].to_dict(), "tie_word_embeddings": tied, "vocab_size": 320})
    folder = save(config, tmp_path)
    weight = 320 * config.hidden_size
    quantised = weight // 2 + 4 * weight // 64 + 64
    for stages in (1, 2):
        plain, head = (
            plan_pool("tiny", folder, pool(stages=stages, quantize_head=asked))[0] for asked in (False, True)
        )
        assert head.head
        assert not plain.head
        # The last of two stages holds a 16-bit head in either case; a single one a tied weight once.
        before = 0 if tied and stages == 1 else 4 * weight
        total = [sum(stage.weight_bytes for stage in plan.stages) for plan in (plain, head)]
        assert total[1] - total[0] == quantised - before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization": "fp32"}, r"quantize_head needs nf4, fp4 or int8 .* in fp32; leave it out"),
        ({"device": "cuda", "kernels": "bitsandbytes"}, "quantize_head on GPUs needs `kernels: headroom`"),
    ],
)
def test_where_it_can_not_be_the_pool_is_refused(
    options: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "cuda_gpus", lambda: (Gpu("Toy", 2 * 10**9, speed=1),))
    CONFIGS["Llama"].save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=message) as caught:
        plan_pool("tiny", tmp_path, pool(quantize_head=True, **options))
    assert "\n" not in str(caught.value)
