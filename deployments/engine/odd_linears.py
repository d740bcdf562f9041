"""bitsandbytes' 4-bit linears with an odd number of outputs, which its own product can't compute on a GPU."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import bitsandbytes.functional
from bitsandbytes.nn import modules
from torch import Tensor, nn
from torch.nn import functional

log = logging.getLogger(__name__)
bitsandbytes_nn: Any = modules


def mend_odd_linears(model: nn.Module) -> int:
    """Let 4-bit linears with an odd number of outputs dequantise their weight, and multiply by that.

    For more than a few rows in 16 bits, bitsandbytes 0.50 writes the results of its product two by two, as words of 32
    bits. Where a row has an odd number of them, every other row begins inside a word, and the GPU stops with
    "misaligned address". GPT-2's head of 50,257, once quantised, is such a linear.

    Returns how many there are.
    """
    linears: list[Any] = [module for module in model.modules() if isinstance(module, bitsandbytes_nn.Linear4bit)]
    odd = [linear for linear in linears if linear.out_features % 2]
    for linear in odd:
        # accelerate's hook calls what it found there, and puts it back when it is removed.
        setattr(linear, "_old_forward" if hasattr(linear, "_old_forward") else "forward", _dequantised(linear))
    if odd:
        log.info("%d linears have an odd number of outputs; bitsandbytes computes them dequantised", len(odd))
    return len(odd)


def _dequantised(linear: Any) -> Callable[[Tensor], Tensor]:
    """A `forward` for this instance alone, in its compute dtype; the result has x's dtype."""

    def forward(x: Tensor) -> Tensor:
        dtype = linear.compute_dtype or x.dtype
        weight = bitsandbytes.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state).to(dtype)
        bias = None if linear.bias is None else linear.bias.to(dtype)
        return functional.linear(x.to(dtype), weight, bias).to(x.dtype)

    return forward
