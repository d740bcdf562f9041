"""Products of a few rows with a tiled weight by the CUDA kernel of `skinny.cu`. Needs capability 9.0 or above."""

from __future__ import annotations

import ctypes
from dataclasses import asdict
from functools import cache, partial

import torch
from torch import Tensor

from deployments.engine.kernels import driver
from deployments.engine.kernels.cubin import compiled
from deployments.engine.kernels.cut import GROUPS, Cut, groups_of
from deployments.engine.kernels.weights import Weight4, Weight8


def skinny_product(x: Tensor, weight: Weight4 | Weight8, bias: Tensor | None, cut: Cut) -> Tensor:
    """x [rows, k] times a tiled weight, plus bias [n] -> [rows, n] in x's dtype. At most `MOST_ROWS` rows.

    Raises:
        RuntimeError: NVRTC is missing or can't compile the kernel, or the driver refuses it; with its words.
    """
    rows, n, k = x.shape[0], weight.n, weight.k
    x, out = aligned(x), torch.empty(rows, n, dtype=x.dtype, device=x.device)
    groups, format = groups_of(rows), format_of(weight, x.dtype)
    shared = cut.shared_bytes(k, format["BITS"], groups)
    kernel = _kernel(x.device, cut, groups, tuple(format.items()), shared)
    numbers = (rows, n, k // 64, x.stride(0), cut.row_bytes(k))
    driver.launch(
        kernel,
        cut.blocks(n),
        cut.threads,
        cut.cluster,
        shared,
        [ctypes.c_void_p(x.data_ptr()), *operands(weight, bias, out), *map(ctypes.c_int, numbers)],
    )
    return out


@cache
def _kernel(
    _device: torch.device, cut: Cut, groups: int, format: tuple[tuple[str, int], ...], shared: int
) -> ctypes.c_void_p:
    """Loaded on the current device, which `_device` names: each has kernels of its own."""
    return driver.load("skinny", shared, partial(compiled, "skinny", macros(cut, groups, dict(format)), architecture()))


def architecture() -> str:
    """Of the current GPU, as NVRTC names it."""
    return "sm_{}{}".format(*torch.cuda.get_device_capability())


def macros(cut: Cut, groups: int, format: dict[str, int]) -> dict[str, int]:
    """The kernel's compile-time constants.

    Args:
        groups: of 8 rows of x that a launch computes.
        format: `format_of` the operands.
    """
    sizes = {name.upper(): value for name, value in asdict(cut).items()}
    return {**sizes, "THREADS": cut.threads, "GROUPS": groups, "ROUNDED": int(groups == GROUPS[-1]), **format}


def format_of(weight: Weight4 | Weight8, dtype: torch.dtype) -> dict[str, int]:
    """The constants that say what the operands are: bits, the activations' type, and how scales are stored."""
    format = {"BITS": 8, "HALF": int(dtype == torch.float16), "PER_SCALE": 1, "NESTED": 0}
    if isinstance(weight, Weight4):
        format |= {"BITS": 4, "PER_SCALE": weight.blocksize // 64, "NESTED": int(weight.nested is not None)}
    return format


def aligned(x: Tensor) -> Tensor:
    """x, or a copy whose rows begin at multiples of 16 bytes."""
    if x.stride(-1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:
        return x.clone(memory_format=torch.contiguous_format)  # `contiguous` would keep one that is not aligned
    return x


def operands(weight: Weight4 | Weight8, bias: Tensor | None, out: Tensor) -> list[driver.Argument]:
    """Those after x, in the kernels' order."""
    four = weight if isinstance(weight, Weight4) else None
    nested = None if four is None else four.nested
    extra = (None, None, None) if nested is None else (nested.absmax, nested.code, nested.offset)
    code, offset_rows = (None, weight.n) if four is None else (four.code, four.offset_rows)
    scales = map(_address, (weight.packed, weight.absmax, *extra))
    return [*scales, ctypes.c_int(offset_rows), *map(_address, (code, bias, out))]


def _address(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
