"""Mixtures of experts whose fused experts are quantised: planned to the byte, served on one stage and on two.

The oracle is transformers on weights that were quantised by bitsandbytes as a whole, and dequantised.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from deployments.engine.experts import EightBitExperts, FourBitExperts
from deployments.engine.loader import load, quantization_config
from deployments.errors import ConfigError
from deployments.planning import plan_pool
from deployments.settings import PoolSettings
from placement import probe
from placement.hardware import Gpu
from placement.plan import Plan
from tests.contract.families import FAMILIES
from tests.contract.greedy import LIMITS, generated, make_prompts, run, save

PROMPTS = make_prompts()
CONFIGS = {family.name: family.config for family in FAMILIES}


def pool(**options: Any) -> PoolSettings:
    small = {"device": "cpu", "block_size": 4, "max_sequences": 16, "max_batch_tokens": 256, "max_context": 64}
    return PoolSettings.model_validate(small | {"cpu_device_memory": "60MB", "dtype": "float32"} | options)


def rounded(weight: Tensor, quantization: str, *, double_quant: bool) -> Tensor:
    """What is left of weights that were quantised."""
    if quantization == "int8":
        scales = weight.abs().amax(-1, keepdim=True) / 127
        return (weight / scales).round() * scales
    return dequantize_4bit(*quantize_4bit(weight, quant_type=quantization, compress_statistics=double_quant))


def oracle(folder: Path, plan: Plan) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=quantization_config(plan)
    )
    fused = [weight for name, weight in model.named_parameters() if ".experts." in name and weight.dim() == 3]
    assert len(fused) in (2, 4)  # of one layer or of both
    for weight in fused:
        weight.data = rounded(weight.data, plan.quantization, double_quant=plan.double_quant)
    return model


@pytest.mark.parametrize(
    ("name", "quantization", "double_quant"),
    [
        ("Mixtral", "nf4", True),
        ("Mixtral", "int8", False),
        ("Qwen3 MoE", "nf4", False),
        ("Qwen3 MoE", "int8", False),
        ("DeepSeek-V2", "fp4", False),
        ("GPT-OSS", "nf4", False),
    ],
)
def test_greedy_tokens_equal_generate(name: str, quantization: str, double_quant: bool, tmp_path: Path) -> None:
    folder = save(CONFIGS[name], tmp_path)
    settings = {"quantization": quantization, "double_quant": double_quant, "quantize_experts": True}
    plan, _ = plan_pool("tiny", folder, pool(**settings))
    outputs = generated(oracle(folder, plan), PROMPTS)
    expected = {f"{i}": ids for i, ids in enumerate((*outputs, outputs[0]))}
    two, _ = plan_pool("tiny", folder, pool(**settings, stages=2))
    assert len(two.stages) == 2
    for each in (plan, two):
        assert run(load(folder, each, device_type="cpu"), each, LIMITS, PROMPTS)[0] == expected
    plain, _ = plan_pool("tiny", folder, pool(**settings | {"quantize_experts": False}))
    assert plan.stages[0].weight_bytes < plain.stages[0].weight_bytes


@pytest.mark.parametrize("double_quant", [False, True])
def test_each_expert_is_what_bitsandbytes_makes_of_all_of_them(double_quant: bool) -> None:
    """300 blocks to an expert, so that the second level's blocks of 256 do not begin with an expert."""
    weight = torch.randn(3, 60, 320, generator=torch.Generator().manual_seed(1))
    experts = FourBitExperts(weight, "nf4", double_quant=double_quant)
    whole = rounded(weight, "nf4", double_quant=double_quant)
    for expert in range(3):
        assert torch.equal(experts[torch.tensor(expert)], whole[expert])


def test_rows_of_zeros_stay_zero_in_8_bits() -> None:
    weight = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1))
    weight[1, 2] = 0
    experts = EightBitExperts(weight)
    assert torch.equal(experts[1][2], torch.zeros(64))
    torch.testing.assert_close(experts[0], weight[0], rtol=0, atol=float(weight[0].abs().max()) / 250)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("Llama", {}, "tiny has no fused experts to quantise; leave quantize_experts out"),
        ("Mixtral", {"quantization": "fp32"}, r"quantize_experts needs nf4, fp4 or int8 .* in fp32; leave it out"),
        ("Mixtral", {"device": "cuda"}, "quantize_experts is for the CPU yet"),
    ],
)
def test_where_there_is_nothing_to_quantise_the_pool_is_refused(
    name: str, options: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "cuda_gpus", lambda: (Gpu("Toy", 2 * 10**9, speed=1),))
    CONFIGS[name].save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=message) as caught:
        plan_pool("tiny", tmp_path, pool(quantize_experts=True, **options))
    assert "\n" not in str(caught.value)
