"""A layer's tensors in one allocation, its arena: where each lies, and what CUDA's allocator takes for it.

While a model is loaded, tensors of all sizes come and go, and what stays keeps the allocator's segments that it lies in
from being given back. So the engine moves each layer's tensors into an allocation of their own once the layer is as it
will be served, and all that is lost is the rounding of that allocation.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate

ALIGNMENT = 512
"""Bytes: that of PyTorch's own CUDA allocations, which kernels may count on."""

QUANTISED = ("nf4", "fp4", "int8", "gptq-2bit", "gptq-4bit", "awq-4bit")
"""Quantisations whose layers get an arena. Other weights are loaded once, as they stay, and leave nothing behind."""

_SMALL, _OWN = 2**20, 10 * 2**20
"""Allocations of up to so many bytes share small segments; from so many on, each has a segment of its own."""
_SMALL_SEGMENT, _SEGMENT, _ROUNDING = 2 * 2**20, 20 * 2**20, 2 * 2**20
"""Bytes of a shared segment for small allocations and for others; and what segments of one allocation are rounded to.
All from c10/cuda/CUDACachingAllocator of PyTorch 2.11."""


def layout(sizes: Iterable[int]) -> tuple[tuple[int, ...], int]:
    """Offsets of tensors of `sizes` bytes, in order, and the bytes of the whole arena."""
    *offsets, total = accumulate(map(_aligned, sizes), initial=0)
    return tuple(offsets), total


def taken(size: int) -> int:
    """Bytes of the allocator's segments that an arena of `size` bytes takes: its share where several fit into one."""
    if size >= _OWN:
        return -(-size // _ROUNDING) * _ROUNDING
    segment = _SMALL_SEGMENT if size <= _SMALL else _SEGMENT
    return -(-segment // (segment // _aligned(size))) if size else 0


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
