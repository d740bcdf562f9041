"""Experts that are fused into one tensor [experts, a, b] and quantised: what they take beside their weights."""

from __future__ import annotations

from placement.footprint import Footprint, Module, Tensor
from placement.kv import dtype_bytes


def fused(layer: Module) -> list[Tensor]:
    """A layer's quantised experts, where they are fused."""
    return [tensor for tensor in layer.tensors if tensor.linear and len(tensor.shape) == 3]


def largest_fused(footprint: Footprint) -> int:
    """Elements of the largest."""
    return max((tensor.elements for layer in footprint.layers for tensor in fused(layer)), default=0)


def waiting_bytes(footprint: Footprint) -> int:
    """What all of them take more before they are quantised."""
    return sum(t.elements * t.itemsize - t.bytes for layer in footprint.layers for t in fused(layer))


def dequantised_bytes(footprint: Footprint) -> int:
    """On a GPU, for one step, of the layer that has most: all its projections are there at once in the compute dtype,
    and what the largest is made from (4 bits: its codes and scales; int8: itself in float32)."""
    size, source = dtype_bytes(footprint.dtype), 5 if footprint.quantization == "int8" else 1
    layers = ([tensor.elements for tensor in fused(layer)] for layer in footprint.layers)
    return max((size * sum(counts) + source * max(counts) for counts in layers if counts), default=0)
