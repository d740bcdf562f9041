"""Mixtures of experts whose fused experts are quantised, on a GPU as a replica runs them.

pytest tests/gpu/test_experts_gpu.py
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from deployments.engine import expert_loading
from deployments.engine.experts import EightBitExperts, FourBitExperts, eight_bits, experts_forward, four_bits
from deployments.engine.loader import load
from placement.anatomy import fused_experts
from placement.footprint import footprint
from placement.plan import Plan
from placement.recipe import BLOCK
from tests.gpu.teacher import BOUND, COARSE, LIMITS, check, plain_model, plan_on_gpus, serve
from tests.gpu.waits import no_waits
from tests.unit.engine.tiny import save

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),  # FlashInfer's imports warn, and so does PyTorch's sync debug mode
]

STRAYS = 0.08
"""On a CPU as in teacher.py, one forward of Mixtral has up to 0.022 of the tokens over the bound, and up to 0.62 off;
Qwen3's has none."""
_COMMON: dict[str, Any] = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
    "max_position_embeddings": 512,
    "num_experts_per_tok": 2,
}
FAMILIES: dict[str, PreTrainedConfig] = {
    "mixtral": transformers.MixtralConfig(**_COMMON, intermediate_size=512, num_local_experts=8),
    "qwen3_moe": transformers.Qwen3MoeConfig(
        **_COMMON, intermediate_size=512, moe_intermediate_size=128, num_experts=16, head_dim=64
    ),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkpoint."""
    yield save(tmp_path_factory.mktemp(request.param), FAMILIES[request.param], seed=0)
    torch._dynamo.reset()  # what was compiled for many models counts against the limit of one


def oracle(folder: Path, plan: Plan) -> PreTrainedModel:
    """transformers' own, its experts those that dequantising gives."""
    model = plain_model(folder, plan)
    if not plan.experts:
        return model
    for weight in fused_experts(model, BLOCK).values():
        packed: Any = expert_loading._quantised(weight, plan)
        kept = EightBitExperts(packed, weight.dtype) if plan.quantization == "int8" else FourBitExperts(packed)
        weight.data = kept.whole()
    return model


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("quantization", ["nf4", "int8", "bf16"])
def test_tokens_are_the_plain_forwards_argmax(family: Path, quantization: str, stages: int) -> None:
    plan = plan_on_gpus(footprint(family, quantization=quantization, experts=quantization != "bf16"), stages)
    served = serve(load(family, plan, device_type="cuda", limits=LIMITS), plan)
    check(oracle(family, plan), served, COARSE if quantization == "int8" else BOUND, strays=STRAYS)


@pytest.mark.parametrize("quantization", ["nf4", "nf4+dq", "fp4", "int8"])
@pytest.mark.parametrize("tokens", [1, 8, 9, 300])
@torch.inference_mode()
def test_the_forward_waits_for_nothing_and_can_be_captured(quantization: str, tokens: int) -> None:
    config = FAMILIES["qwen3_moe"]
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    plain = Qwen3MoeExperts(config).to("cuda", torch.bfloat16)
    quantised = Qwen3MoeExperts(config).to("cuda", torch.bfloat16)
    for name in ("gate_up_proj", "down_proj"):
        weight = getattr(plain, name)
        weight.data.normal_(std=0.1)
        delattr(quantised, name)
        kind, _, doubled = quantization.partition("+")
        if kind == "int8":
            kept: Any = EightBitExperts(eight_bits(weight), torch.bfloat16)
        else:
            kept = FourBitExperts(four_bits(weight, kind, double_quant=bool(doubled)))
        setattr(quantised, name, kept)
        weight.data = kept.whole()
    hidden = torch.randn(tokens, 256, device="cuda", dtype=torch.bfloat16)
    weights, index = torch.rand(tokens, 16, device="cuda").softmax(-1).topk(2)
    expected = plain(hidden, index, weights.bfloat16())
    arguments = quantised, hidden, index, weights.bfloat16()
    experts_forward(*arguments)
    with no_waits():
        found = experts_forward(*arguments)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = experts_forward(*arguments)
    hidden.copy_(hidden.flip(0))
    index.copy_(index.flip(0))
    graph.replay()
    torch.testing.assert_close(captured, experts_forward(*arguments))
