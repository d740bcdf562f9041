"""Footprints of a few bytes, made by hand: one byte per element, so that budgets can be added up in a comment."""

from __future__ import annotations

from collections.abc import Sequence

from placement.footprint import Footprint, Geometry, Module, Role, Tensor
from placement.kv import LayerKv

KV_PER_TOKEN = 4
"""Bytes per token and layer of `toy_footprint` with a float16 cache: 2 * 1 head * 1 element * 2 bytes."""


def toy_footprint(
    layers: Sequence[int],
    *,
    embedding: int = 100,
    head: int = 0,
    norm: int = 1,
    shared: int = 2,
    tied: bool = False,
    works: Sequence[int] | None = None,
    head_work: int = 0,
    kv_heads: Sequence[int] | None = None,
) -> Footprint:
    """`layers` are the bytes of each; `works` their multiply-adds (default: their bytes). `tied`: the head is the
    embedding."""
    modules = [_module("embed", "first", embedding, 0)]
    modules += [_module(f"layers.{i}", "layer", size, (works or layers)[i]) for i, size in enumerate(layers)]
    modules += [_module("rotary", "shared", shared, 0), _module("norm", "last", norm, 0)]
    storage = "embed.weight" if tied else "head.weight"
    modules.append(_module("head", "last", embedding if tied else head, head_work, storage))
    kv = tuple(LayerKv(heads, 1) for heads in kv_heads or [1] * len(layers))
    geometry = Geometry(hidden=1, vocab=1, heads=max(k.kv_heads for k in kv), max_context=64, softcap=False, kv=kv)
    return Footprint("toy", "fp16", False, "float16", tuple(modules), geometry)


def _module(name: str, role: Role, size: int, work: int, storage: str | None = None) -> Module:
    weight = f"{name}.weight"
    tensor = Tensor(weight, storage or weight, (size,), 1, False, size)
    return Module(name, role, (tensor,), work)
