"""The second product of GPTQ's and AWQ's linears with zeros, in 16 bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from deployments.engine.grouped_stored import StoredLinear, repack
from deployments.engine.kernels.grouped import GroupedLinear4, sum_unit
from placement.recipe import Grouped

INPUTS, OUTPUTS = 4096, 32


def stored(group_size: int, zero: int) -> StoredLinear:
    """Random codes of 4 bits; as GPTQ stores them."""
    recipe = Grouped(method="gptq", bits=4, group_size=group_size, symmetric=False)
    linear = StoredLinear(nn.Linear(INPUTS, OUTPUTS, bias=False), recipe, less_one=False).to_empty(device="cpu")
    draw = torch.Generator().manual_seed(0)
    linear.qweight.random_(-(2**31), 2**31 - 1, generator=draw)
    linear.qzeros.fill_(int.from_bytes(bytes([zero * 17] * 4), signed=True))
    linear.scales.copy_(0.01 + 0.01 * torch.rand(linear.scales.shape, generator=draw))
    linear.g_idx = (torch.arange(INPUTS) // linear.group_size).int()
    return linear


def exact(linear: StoredLinear, x: Tensor) -> Tensor:
    return x.double() @ linear.dequantised(torch.float64).t()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group_size", [-1, 128])
def test_inputs_of_50_do_not_overflow(group_size: int, dtype: torch.dtype) -> None:
    """Their sum, 204,800, is beyond float16; what they are multiplied to is not."""
    linear = stored(group_size, zero=6)
    draw = torch.Generator().manual_seed(1)
    x = torch.full((3, INPUTS), 50.0)
    x[1] += torch.randn(INPUTS, generator=draw)
    x[2] = 0.01 * torch.randn(INPUTS, generator=draw)
    x = x.to(dtype)
    expected = exact(linear, x)
    model = nn.Sequential(linear)
    repack(model, dtype)
    assert isinstance(model[0], GroupedLinear4)
    found = model(x).double()
    # Rounded, by half an eps, are the first product, each group's sum and its shift (at most 2 * 0.02), and the result.
    sums = x.double().view(3, -1, linear.group_size).sum(-1).abs().sum(-1)
    bound = torch.finfo(dtype).eps / 2 * (2 * expected.abs().amax(1) + 3 * 2 * 0.02 * sums)
    assert bool(((found - expected).abs().amax(1) <= 1.1 * bound).all())


def test_a_unit_is_near_the_root() -> None:
    assert [sum_unit(size) for size in (32, 128, 4096, 11008, 28672)] == [4, 8, 64, 86, 224]
