"""Linears with an odd number of outputs on a GPU, where bitsandbytes' own product of them stops the process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import modules
from torch import Tensor, nn

from deployments.engine.odd_linears import mend_odd_linears

bitsandbytes: Any = modules
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


HALF_GAP = {"nf4": 0.152, "fp4": 1 / 6}
"""Between the two codes that lie farthest apart: -1 and -0.696, 0.667 and 1."""
EPSILON = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Largest relative error of rounding."""


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("outputs", "inputs"), [(1465, 256), (50257, 768)])
@pytest.mark.parametrize("rows", [1, 8, 41])
def test_every_row_is_what_the_weight_says(kind: str, dtype: torch.dtype, outputs: int, inputs: int, rows: int) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(inputs, outputs, bias=False, dtype=dtype)
    linear: Any = bitsandbytes.Linear4bit(inputs, outputs, False, dtype, compress_statistics=False, quant_type=kind)
    linear.load_state_dict(plain.state_dict())
    linear = linear.cuda()
    assert mend_odd_linears(linear) == 1
    x = torch.randn(rows, inputs, dtype=dtype, device="cuda")
    found = linear(x)
    torch.cuda.synchronize()
    weight = dequantize_4bit(linear.weight.data, linear.weight.quant_state).double()
    check_weight(weight, plain.weight.detach().to(weight), HALF_GAP[kind] + EPSILON[dtype])
    check_products(found.double(), x.double(), weight, 2 * EPSILON[dtype])


def check_weight(found: Tensor, plain: Tensor, bound: float) -> None:
    """Each element of `found` is within `bound` of the largest of its block of 64 from that of `plain`."""
    largest = plain.view(-1, 64).abs().amax(1, keepdim=True)
    off = (found - plain).view(-1, 64).abs() / largest
    assert float(off.max()) <= bound


def check_products(found: Tensor, x: Tensor, weight: Tensor, bound: float) -> None:
    """`found` is x times the weight, but for rounding to 16 bits: of the result, and of parts of its sum where cuBLAS
    divides it. These are of the size of their standard deviation, the norm of a row of the weight (x is normal)."""
    expected = x @ weight.t()
    off = (found - expected).abs() / (expected.abs() + weight.norm(dim=1))
    assert float(off.max()) <= bound
