"""Linears with an odd number of outputs on a GPU, where bitsandbytes' own product of them stops the process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bitsandbytes.nn import modules
from torch import nn
from torch.nn import functional

from deployments.engine.odd_linears import mend_odd_linears

bitsandbytes: Any = modules
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


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
    error = (found.cpu().float() - functional.linear(x.cpu().float(), plain.weight.float())).norm()
    assert error < 0.25 * functional.linear(x.cpu().float(), plain.weight.float()).norm(), "4 bits round by a tenth"
