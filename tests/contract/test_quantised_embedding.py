"""Models whose input embedding is quantised too: planned to the byte, served on one stage and on two.

The oracle is transformers with the embedding's dequantised weights, and a head that is tied to it as it was.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from deployments.engine import embedding
from deployments.engine.embedding import QuantisedEmbedding, quantised_rows
from deployments.engine.experts import EightBitExperts, FourBitExperts
from deployments.engine.loader import load, quantization_config
from deployments.errors import ConfigError
from deployments.planning import plan_pool
from placement.footprint import footprint
from placement.plan import Plan
from tests.contract.families import CONFIGS
from tests.contract.greedy import LIMITS, answers, generated, make_prompts, pool, rounded, run, save

PROMPTS = make_prompts()
TIED = {"Llama": False, "GPT-2": True, "BLOOM": True, "OPT": True}


def oracle(folder: Path, plan: Plan, *, tied: bool) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=quantization_config(plan)
    )
    embedding: Any = model.get_input_embeddings()
    assert (model.get_output_embeddings().weight is embedding.weight) == tied
    embedding.weight = nn.Parameter(
        rounded(embedding.weight.detach(), plan.quantization, plan.double_quant), requires_grad=False
    )
    return model


@pytest.mark.parametrize(
    ("name", "quantization", "double_quant"),
    [("Llama", "nf4", True), ("GPT-2", "fp4", False), ("BLOOM", "nf4", False), ("OPT", "int8", False)],
)
def test_greedy_tokens_equal_generate(name: str, quantization: str, double_quant: bool, tmp_path: Path) -> None:
    """The plan's bytes are compared with what is loaded at each load."""
    folder = save(CONFIGS[name], tmp_path / "model")
    settings = {"quantization": quantization, "double_quant": double_quant, "quantize_embeddings": True}
    plan, _ = plan_pool("tiny", folder, pool(**settings))
    assert (plan.embeddings, plan.head) == (True, False)
    model = oracle(folder, plan, tied=TIED[name])
    outputs = generated(model, PROMPTS)
    expected = answers(outputs)
    two, _ = plan_pool("tiny", folder, pool(**settings, stages=2))
    for each, cache in ((plan, None), (two, None), (two, tmp_path / "kept")):
        served = load(folder, each, device_type="cpu", cache_dir=cache)
        assert run(served, each, LIMITS, PROMPTS)[0] == expected
    plain, _ = plan_pool("tiny", folder, pool(**settings | {"quantize_embeddings": False}, stages=2))
    assert two.stages[0].weight_bytes < plain.stages[0].weight_bytes


def test_embedding_and_head_are_quantised_together(tmp_path: Path) -> None:
    folder = save(CONFIGS["BLOOM"], tmp_path)
    settings = {"quantization": "nf4", "quantize_embeddings": True, "quantize_head": True, "stages": 2}
    plan, _ = plan_pool("tiny", folder, pool(**settings))
    model = oracle(folder, plan, tied=True)
    head: Any = model.get_output_embeddings()
    head.weight = nn.Parameter(rounded(head.weight.detach(), plan.quantization, plan.double_quant), requires_grad=False)
    outputs = generated(model, PROMPTS)
    expected = answers(outputs)
    assert run(load(folder, plan, device_type="cpu"), plan, LIMITS, PROMPTS)[0] == expected


def test_bytes_by_hand(tmp_path: Path) -> None:
    folder = save(CONFIGS["BLOOM"], tmp_path)
    weight = 256 * 64
    plain, quantised = (footprint(folder, quantization="nf4", embeddings=asked) for asked in (False, True))
    first, last = (next(m for m in quantised.modules if m.name.endswith(name)) for name in ("embeddings", "lm_head"))
    assert first.bytes == weight // 2 + 4 * weight // 64 + 64
    assert last.bytes == 2 * weight
    assert quantised.bytes - plain.bytes == first.bytes, "on one device a tied head stays where its embedding was"


@pytest.mark.parametrize(
    ("quantization", "double_quant"), [("nf4", False), ("nf4", True), ("fp4", True), ("int8", False)]
)
def test_rows_are_what_bitsandbytes_makes_of_the_whole(
    quantization: str, double_quant: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quantised in parts of 7 rows, so that the second level's blocks of 256 do not end with them."""
    monkeypatch.setattr(embedding, "_PART_ROWS", 7)
    folder = save(CONFIGS["Llama"], tmp_path)
    settings = {"quantization": quantization, "double_quant": double_quant, "quantize_embeddings": True}
    plan, _ = plan_pool("tiny", folder, pool(**settings))
    weight = torch.randn(100, 192, generator=torch.Generator().manual_seed(1))
    made = quantised_rows(weight, plan, torch.device("cpu"))
    rows = EightBitExperts(made, torch.float32) if quantization == "int8" else FourBitExperts(made)
    ids = torch.tensor([[3, 99], [0, 3]])
    torch.testing.assert_close(
        QuantisedEmbedding(rows)(ids), rounded(weight, plan.quantization, plan.double_quant)[ids], rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("Llama", {"quantization": "fp32"}, r"quantize_embeddings needs nf4, fp4 or int8 .* in fp32; leave it out"),
        (
            "Gemma 3",
            {},
            r"an embedding that is not quantised \(Gemma3TextScaledWordEmbedding, of 64 .*leave quantize_emb",
        ),
    ],
)
def test_where_it_can_not_be_the_pool_is_refused(
    name: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    CONFIGS[name].save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=message) as caught:
        plan_pool("tiny", tmp_path, pool(quantize_embeddings=True, **options))
    assert "\n" not in str(caught.value)
