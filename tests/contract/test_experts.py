"""Mixtures of experts whose fused experts are quantised: planned to the byte, served on one stage and on two.

The oracle is transformers on weights that were quantised by bitsandbytes as a whole, and dequantised.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.moe import ExpertsInterface
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from deployments.engine import expert_loading, loader
from deployments.engine.experts import (
    IMPLEMENTATION,
    EightBitExperts,
    FourBitExperts,
    QuantisedExperts,
    eight_bits,
    four_bits,
)
from deployments.engine.loader import load, quantization_config
from deployments.errors import ConfigError
from deployments.planning import plan_pool
from placement import probe
from placement.anatomy import fused_experts
from placement.footprint import footprint
from placement.hardware import Gpu
from placement.plan import Plan
from placement.reserve import reserve
from placement.workload import Workload
from tests.contract.families import CONFIGS
from tests.contract.greedy import LIMITS, answers, generated, make_prompts, pool, rounded, run, save

PROMPTS = make_prompts()


def oracle(folder: Path, plan: Plan) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=quantization_config(plan)
    )
    fused = [weight for name, weight in model.named_parameters() if ".experts." in name and weight.dim() == 3]
    assert len(fused) in (2, 4)  # of one layer or of both
    for weight in fused:
        weight.data = rounded(weight.data, plan.quantization, plan.double_quant)
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
    expected = answers(outputs)
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
    experts = FourBitExperts(four_bits(weight, "nf4", double_quant=double_quant))
    whole = rounded(weight, "nf4", double_quant)
    for expert in range(3):
        assert torch.equal(experts[torch.tensor(expert)], whole[expert])


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_several_experts_and_all_of_them_are_what_each_is(quantization: str) -> None:
    weight = torch.randn(5, 16, 64, generator=torch.Generator().manual_seed(1))
    experts: QuantisedExperts
    if quantization == "int8":
        experts = EightBitExperts(eight_bits(weight), torch.float32)
    else:
        experts = FourBitExperts(four_bits(weight, quantization, double_quant=True))
    each = torch.stack([experts[index] for index in range(5)])
    chosen = torch.tensor([3, 0, 3, 1])
    assert torch.equal(experts[chosen], each[chosen])
    assert torch.equal(experts.whole(), each)


def test_the_scales_of_a_few_experts_are_found_without_an_index_of_all() -> None:
    weight = torch.randn(16, 16, 64, generator=torch.Generator().manual_seed(1))
    experts = FourBitExperts(four_bits(weight, "nf4", double_quant=True))
    experts[torch.tensor([0])]

    class Ranges(TorchFunctionMode):
        sizes: ClassVar[list[int]] = []

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            del types
            result = func(*args, **(kwargs or {}))
            if func is torch.arange:
                self.sizes.append(result.numel())
            return result

    with Ranges():
        experts[torch.tensor([3, 0])]
    assert Ranges.sizes == [16], "the blocks of one expert"


@pytest.mark.parametrize(
    ("name", "quantization"), [("Mixtral", "nf4"), ("Qwen3 MoE", "int8"), ("DeepSeek-V2", "fp4"), ("GPT-OSS", "nf4")]
)
def test_the_forward_for_gpus_chooses_the_same_tokens(
    name: str, quantization: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU: steps of 1 and 2 rows visit no more than the 4 experts, longer ones more."""
    monkeypatch.setattr(loader, "settle_experts", lambda *args, **_: expert_loading.settle_experts(*args, on_gpu=True))
    visits: list[int] = []
    inner = ExpertsInterface._global_mapping[IMPLEMENTATION]

    def counted(experts: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        visits.append(index.numel())
        return inner(experts, hidden, index, weights)

    monkeypatch.setitem(ExpertsInterface._global_mapping, IMPLEMENTATION, counted)
    folder = save(CONFIGS[name], tmp_path)
    plan, _ = plan_pool("tiny", folder, pool(quantization=quantization, quantize_experts=True, stages=2))
    outputs = generated(oracle(folder, plan), PROMPTS)
    expected = answers(outputs)
    assert run(load(folder, plan, device_type="cpu"), plan, LIMITS, PROMPTS)[0] == expected
    assert min(visits) <= 4 < max(visits)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call:UserWarning")
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("tokens", [2, 9])
def test_the_forward_for_gpus_asks_the_host_nothing(quantization: str, tokens: int) -> None:
    """Compiled whole, it can't: what depends on values would break the graph."""
    config = CONFIGS["Qwen3 MoE"]
    config._experts_implementation = IMPLEMENTATION
    experts = Qwen3MoeExperts(config).to(torch.bfloat16)
    for name in ("gate_up_proj", "down_proj"):
        weight = torch.randn(getattr(experts, name).shape, generator=torch.Generator().manual_seed(1)).bfloat16()
        delattr(experts, name)
        if quantization == "int8":
            setattr(experts, name, EightBitExperts(eight_bits(weight), torch.bfloat16))
        else:
            setattr(experts, name, FourBitExperts(four_bits(weight, quantization, double_quant=True)))
    hidden = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    index = torch.tensor([[0, 3]] * tokens)
    weights = torch.full((tokens, 2), 0.5, dtype=torch.bfloat16)
    with torch.inference_mode():
        compiled = torch.compile(experts, fullgraph=True, backend="eager")
        found = compiled(hidden, index, weights)
        config._experts_implementation = "eager"
        expected = experts(hidden, index, weights)
    torch._dynamo.reset()
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.05 * float(expected.abs().max()))


def test_experts_are_quantised_one_by_one_while_they_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None is left in 16 or 32 bits once the checkpoint is read, and bitsandbytes' quantiser is as it was."""
    folder = save(CONFIGS["Mixtral"], tmp_path)
    plan, _ = plan_pool("tiny", folder, pool(quantization="nf4", quantize_experts=True))
    before = Bnb4BitHfQuantizer.param_needs_quantization, Bnb4BitHfQuantizer.get_quantize_ops
    found: list[dict[str, Any]] = []

    def settle(model: PreTrainedModel, plan: Plan, **options: bool) -> None:
        found.append(fused_experts(model, 64))
        expert_loading.settle_experts(model, plan, **options)

    monkeypatch.setattr(loader, "settle_experts", settle)
    load(folder, plan, device_type="cpu")
    assert found == [{}]
    assert (Bnb4BitHfQuantizer.param_needs_quantization, Bnb4BitHfQuantizer.get_quantize_ops) == before
    load(folder, plan, device_type="cpu", cache_dir=tmp_path / "cache")  # where a quantised copy is kept: afterwards
    assert len(found[1]) == 4


@pytest.mark.parametrize(("quantization", "source"), [("nf4", 1), ("int8", 5)])
def test_a_gpu_s_plan_holds_back_dequantised_experts(quantization: str, source: int, tmp_path: Path) -> None:
    folder = save(CONFIGS["Mixtral"], tmp_path)
    # 4 experts of gate and up [2 * 128, 64] and down [64, 128] in 2 bytes, and what the larger is made from.
    expected = 2 * 4 * 3 * 128 * 64 + source * 4 * 2 * 128 * 64
    for attention in ("torch", "flashinfer"):
        workload = Workload(16, 64, 4, 64, "bfloat16", attention)
        plain, quantised = (
            reserve(
                footprint(folder, quantization=quantization, experts=experts),
                workload,
                device_type="cuda",
            )
            for experts in (False, True)
        )
        assert quantised.dequantisation >= expected > plain.dequantisation
        assert quantised.graphs - plain.graphs == (expected if attention == "flashinfer" else 0)


def test_experts_beyond_what_bitsandbytes_counts_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"experts of 2,147,483,648 weights .* use int8, or leave quantize_experts out"
    ):
        four_bits(torch.empty(2**11, 2**10, 2**10, device="meta"), "nf4", double_quant=False)


def test_rows_of_zeros_stay_zero_in_8_bits() -> None:
    weight = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1))
    weight[1, 2] = 0
    experts = EightBitExperts(eight_bits(weight), torch.float32)
    assert torch.equal(experts[1][2], torch.zeros(64))
    torch.testing.assert_close(experts[0], weight[0], rtol=0, atol=float(weight[0].abs().max()) / 250)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("Llama", {}, "tiny has no fused experts to quantise; leave quantize_experts out"),
        ("Mixtral", {"quantization": "fp32"}, r"quantize_experts needs nf4, fp4 or int8 .* in fp32; leave it out"),
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
