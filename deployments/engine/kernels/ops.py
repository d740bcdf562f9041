"""The products as PyTorch operators, `headroom::linear_4bit` and `headroom::linear_8bit`: safe under CUDA graphs and
`torch.compile`. On a CPU they are the definition of `weights`, for tests; there, bitsandbytes' own kernels serve.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from deployments.engine.kernels.weights import Nested, Weight4, Weight8, dequantise4, dequantise8


@torch.library.custom_op("headroom::linear_4bit", mutates_args=())
def linear_4bit(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    bias: Tensor | None,
    n: int,
    k: int,
    blocksize: int,
) -> Tensor:
    """x [..., k] times a `Weight4`, plus bias [n] -> [..., n] in x's dtype.

    Raises:
        ValueError: x's last dimension is not k.
    """
    nested = None
    if nested_absmax is not None and nested_code is not None and offset is not None:
        nested = Nested(nested_absmax, nested_code, offset)
    return _product(x, Weight4(n, k, blocksize, packed, absmax, code, nested), bias)


@torch.library.custom_op("headroom::linear_4bit_shifted", mutates_args=())
def linear_4bit_shifted(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    sums: Tensor,
    shift: Tensor,
    bias: Tensor | None,
    n: int,
    k: int,
    blocksize: int,
) -> Tensor:
    """`linear_4bit` and a second product, sums [..., blocks] times shift [n, blocks], added in place.

    Raises:
        ValueError: x's last dimension is not k.
    """
    out = _product(x, Weight4(n, k, blocksize, packed, absmax, code), bias)
    out.view(-1, n).addmm_(sums.reshape(-1, sums.shape[-1]), shift.t())
    return out


@torch.library.custom_op("headroom::linear_8bit", mutates_args=())
def linear_8bit(x: Tensor, packed: Tensor, absmax: Tensor, bias: Tensor | None, n: int, k: int) -> Tensor:
    """x [..., k] times a `Weight8`, plus bias [n] -> [..., n] in x's dtype.

    Raises:
        ValueError: x's last dimension is not k.
    """
    return _product(x, Weight8(n, k, packed, absmax), bias)


@linear_4bit.register_fake
def _(x, packed, absmax, code, nested_absmax, nested_code, offset, bias, n, k, blocksize):  # type: ignore[no-untyped-def]  # the operator's own types  # noqa: ARG001
    return x.new_empty(*x.shape[:-1], n)


@linear_4bit_shifted.register_fake
def _(x, packed, absmax, code, sums, shift, bias, n, k, blocksize):  # type: ignore[no-untyped-def]  # the operator's own types  # noqa: ARG001
    return x.new_empty(*x.shape[:-1], n)


@linear_8bit.register_fake
def _(x, packed, absmax, bias, n, k):  # type: ignore[no-untyped-def]  # the operator's own types  # noqa: ARG001
    return x.new_empty(*x.shape[:-1], n)


def _product(x: Tensor, weight: Weight4 | Weight8, bias: Tensor | None) -> Tensor:
    if x.shape[-1] != weight.k:
        raise ValueError(f"the weight has {weight.k} columns, x has {x.shape[-1]}")
    flat = x.reshape(-1, weight.k)
    if x.device.type == "cuda":
        from deployments.engine.kernels.launch import product  # Triton is there only beside CUDA

        with torch.cuda.device_of(x):  # Triton launches on the current device
            return product(flat, weight, bias).view(*x.shape[:-1], weight.n)
    dense = dequantise4(weight, torch.float32) if isinstance(weight, Weight4) else dequantise8(weight, torch.float32)
    out = linear(flat.float(), dense, None if bias is None else bias.float())
    return out.to(x.dtype).view(*x.shape[:-1], weight.n)
