"""Quantised weights as the kernels take them, and what they stand for.

`Weight4` and `Weight8` hold a linear's weight either in tiles (see `repack`) or, where its shape does not suit, as
bitsandbytes stores it. `dequantise` is the definition that the kernels are tested against.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deployments.engine.kernels import repack

NESTED_BLOCK = 256
"""Scales that share a second one under double quantisation."""


@dataclass(frozen=True)
class Nested:
    """Double quantisation: a scale is `code[q] * absmax[index // 256] + offset`, index in bitsandbytes' order."""

    absmax: Tensor
    """float32 [ceil(blocks / 256)]."""
    code: Tensor
    """float32 [256]."""
    offset: Tensor
    """float32: one, or where linears are fused (in tiles) several, each of as many rows, one after the other."""


@dataclass(frozen=True)
class Weight4:
    """A weight [n, k] in NF4, FP4 or any other code of 16 values."""

    n: int
    k: int
    blocksize: int
    """Weights per scale."""
    packed: Tensor
    """Tiled: int32 [n/16, k/64, 128]. Else uint8 [ceil(n * k / 2), 1]."""
    absmax: Tensor
    """float32, or uint8 where nested. Tiled: [k/blocksize, n]. Else [blocks]."""
    code: Tensor
    """float32 [16]."""
    nested: Nested | None = None

    @property
    def tiled(self) -> bool:
        """Whether the small-batch kernel can read it."""
        return self.packed.dtype == torch.int32

    @property
    def offset_rows(self) -> int:
        """Rows that share an offset: all where not nested. Tiled: a multiple of 16."""
        return self.n if self.nested is None else self.n // self.nested.offset.numel()

    @property
    def bytes(self) -> int:
        """Held by the weight and its scales."""
        nested = () if self.nested is None else (self.nested.absmax, self.nested.code, self.nested.offset)
        return sum(tensor.nbytes for tensor in (self.packed, self.absmax, self.code, *nested))


@dataclass(frozen=True)
class Weight8:
    """A weight [n, k] of int8, each row with its absolute maximum."""

    n: int
    k: int
    packed: Tensor
    """Tiled: int32 [n/16, k/64, 256]. Else int8 [n, k]."""
    absmax: Tensor
    """float32 [n]; bitsandbytes calls it SCB."""

    @property
    def tiled(self) -> bool:
        """Whether the small-batch kernel can read it."""
        return self.packed.dtype == torch.int32

    @property
    def bytes(self) -> int:
        """Held by the weight and its scales."""
        return self.packed.nbytes + self.absmax.nbytes


def tile4(weight: Weight4) -> Weight4:
    """The same weight in tiles. The shape must suit (`repack.why_not_tiled`)."""
    n, k = weight.n, weight.k
    packed, absmax = repack.tile_4bit(weight.packed, n, k), repack.transpose_scales(weight.absmax, n)
    return Weight4(n, k, weight.blocksize, packed, absmax, weight.code, weight.nested)


def untile4(weight: Weight4) -> Weight4:
    """The inverse of `tile4`, bit for bit."""
    n, k = weight.n, weight.k
    packed, absmax = repack.untile_4bit(weight.packed, n, k), repack.untranspose_scales(weight.absmax)
    return Weight4(n, k, weight.blocksize, packed, absmax, weight.code, weight.nested)


def tile8(weight: Weight8) -> Weight8:
    """The same weight in tiles. The shape must suit (`repack.why_not_tiled`)."""
    return Weight8(weight.n, weight.k, repack.tile_8bit(weight.packed), weight.absmax)


def untile8(weight: Weight8) -> Weight8:
    """The inverse of `tile8`, bit for bit."""
    return Weight8(weight.n, weight.k, repack.untile_8bit(weight.packed, weight.n, weight.k), weight.absmax)


def dequantise4(weight: Weight4, dtype: torch.dtype) -> Tensor:
    """[n, k] in `dtype`: `code[nibble] * scale`, in PyTorch; the product is float32 (float64 for float64)."""
    if weight.tiled:
        weight = untile4(weight)
    compute = torch.promote_types(dtype, torch.float32)
    scales = weight.absmax
    if weight.nested is not None:
        nested = weight.nested
        outer = nested.absmax.repeat_interleave(NESTED_BLOCK)[: scales.numel()]
        offset = nested.offset.repeat_interleave(scales.numel() // nested.offset.numel())
        scales = nested.code[scales.long()] * outer + offset
    packed = weight.packed.view(-1)
    nibbles = torch.stack((packed >> 4, packed & 15), dim=1).view(-1)[: weight.n * weight.k]
    spread = scales.to(compute).repeat_interleave(weight.blocksize)[: nibbles.numel()]
    return (weight.code.to(compute)[nibbles.long()] * spread).view(weight.n, weight.k).to(dtype)


def dequantise8(weight: Weight8, dtype: torch.dtype) -> Tensor:
    """[n, k] in `dtype`: `int8 * absmax / 127`, in PyTorch; the product is float32 (float64 for float64)."""
    if weight.tiled:
        weight = untile8(weight)
    compute = torch.promote_types(dtype, torch.float32)
    return (weight.packed.to(compute) * (weight.absmax.to(compute) / 127.0)[:, None]).to(dtype)
