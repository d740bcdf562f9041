"""GPTQ and AWQ checkpoints on GPUs as a replica runs them: on the 4-bit kernels, with nothing quantised twice.

pytest tests/gpu/test_grouped_gpu.py
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

from deployments.engine.grouped_stored import StoredLinear, repack
from deployments.engine.kernels.grouped import GroupedLinear4
from deployments.engine.loader import load
from placement.footprint import footprint
from placement.recipe import Grouped, read_recipe
from tests.contract.grouped import Grouping, checkpoint, pack, quantised
from tests.gpu.teacher import LIMITS, check, plain_model, plan_on_gpus, serve

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),  # FlashInfer's imports warn
]

BOUND = 0.3
"""In standard deviations of the logits, as in teacher.py: of this model one forward is off by up to 0.163."""
AWQ = Grouping(method="awq", group_size=128, symmetric=False, version="gemm")
GROUPINGS = (
    Grouping(group_size=128),
    Grouping(group_size=64, act_order=True, symmetric=False),
    Grouping(group_size=32, symmetric=False, version="gptq_v2"),  # no tiles: dequantised for every product
    Grouping(bits=2, group_size=-1),
    AWQ,
)
SERVED = (*GROUPINGS[:2], AWQ)
LABELS = [grouping.label for grouping in GROUPINGS]
CONFIG = transformers.MistralConfig(
    hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=1024, max_position_embeddings=512, sliding_window=None, tie_word_embeddings=False,
)  # fmt: skip


def stored_linear(grouping: Grouping, n: int, k: int) -> StoredLinear:
    """On the first GPU, of random weights."""
    recipe = read_recipe(grouping.config)
    assert isinstance(recipe, Grouped)
    draw = torch.Generator().manual_seed(n + k)
    parts = pack(quantised(0.05 * torch.randn(k, n, generator=draw), grouping, draw), grouping)
    linear = StoredLinear(nn.Linear(k, n, bias=False, device="meta"), recipe, less_one=grouping.version == "gptq")
    for name, tensor in parts.items():
        setattr(linear, name, tensor.to("cuda", torch.float32 if tensor.is_floating_point() else torch.int32))
    return linear


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("grouping", GROUPINGS, ids=LABELS)
@torch.inference_mode()
def test_products_are_those_of_the_codes(grouping: Grouping, dtype: torch.dtype) -> None:
    model = nn.Sequential(stored_linear(grouping, 768, 1024))
    stored = model[0]
    assert isinstance(stored, StoredLinear)
    weight = stored.dequantised(torch.float32)
    assert repack(model, dtype) == 1
    assert isinstance(model[0], GroupedLinear4)
    draw = torch.Generator("cuda").manual_seed(1)
    for rows in (1, 7, 16, 40, 128, 300):
        x = torch.randn(rows, 1024, generator=draw, device="cuda").to(dtype)
        assert relative(model(x).float(), x.float() @ weight.t()) < (6e-3 if dtype == torch.bfloat16 else 1e-3), rows


@pytest.mark.parametrize("stages", [1, 2], ids=["one", "two"])
@pytest.mark.parametrize("grouping", SERVED, ids=[grouping.label for grouping in SERVED])
def test_tokens_are_the_plain_forwards_argmax(grouping: Grouping, stages: int, tmp_path: Path) -> None:
    folder, plain = checkpoint(CONFIG, grouping, tmp_path)
    plan = plan_on_gpus(footprint(folder, dtype="bfloat16"), stages)
    assert (plan.quantization, len(plan.stages)) == (f"{grouping.method}-{grouping.bits}bit", stages)
    served = serve(load(folder, plan, device_type="cuda", limits=LIMITS), plan)
    torch._dynamo.reset()
    check(plain_model(plain, plan), served, BOUND)
