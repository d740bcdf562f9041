"""Footprints of a few bytes, made by hand: one byte per element, so that budgets can be added up in a comment."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from placement import reserve
from placement.footprint import Footprint, Geometry, Module, Role, Tensor
from placement.hardware import Gpu
from placement.kv import LayerKv
from placement.problem import Problem
from placement.question import Question
from placement.reserve import Reserve
from placement.workload import Workload

KV_PER_TOKEN = 4
"""Bytes per token and layer of `toy_footprint` with a float16 cache: 2 * 1 head * 1 element * 2 bytes."""

NOTHING = Reserve(*(12 * [0]))
ONE_TOKEN_BLOCKS = Workload(block_size=1, max_batch_tokens=1, max_sequences=8, max_context=64, kv_dtype="float16")


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
    kv: Sequence[LayerKv] | None = None,
) -> Footprint:
    """`layers` are the bytes of each; `works` their multiply-adds (default: their bytes). `tied`: the head is the
    embedding. `kv` is what each caches (default: `kv_heads` heads of one element, or one head)."""
    modules = [toy_module("embed", "first", embedding)]
    modules += [toy_module(f"layers.{i}", "layer", size, work=(works or layers)[i]) for i, size in enumerate(layers)]
    modules += [toy_module("rotary", "shared", shared), toy_module("norm", "last", norm)]
    storage = "embed.weight" if tied else "head.weight"
    modules.append(toy_module("head", "last", embedding if tied else head, work=head_work, storage=storage))
    caches = tuple(kv or (LayerKv(heads, 1) for heads in kv_heads or [1] * len(layers)))
    return as_footprint(modules, caches)


def toy_encoder_decoder(encoder: Sequence[int], decoder: Sequence[int], *, embedding: int = 100) -> Footprint:
    """An embedding shared by both stacks and the head, a norm of 1 byte behind each stack; the decoder alone caches."""
    modules = [toy_module(f"{stack}.embed", "first", embedding, stack=stack, storage="shared") for stack in _STACKS]
    for stack, sizes in zip(_STACKS, (encoder, decoder), strict=True):
        modules += [
            toy_module(f"{stack}.block.{i}", "layer", size, work=size, stack=stack) for i, size in enumerate(sizes)
        ]
    modules += [toy_module(f"{stack}.norm", "last", 1, stack=stack) for stack in _STACKS]
    modules.append(toy_module("head", "last", embedding, stack="decoder", storage="shared"))
    kv = (LayerKv(),) * len(encoder) + (LayerKv(1, 1, cross_elements=2),) * len(decoder)
    return as_footprint(modules, kv)


_STACKS = ("encoder", "decoder")


def as_footprint(modules: Sequence[Module], kv: tuple[LayerKv, ...]) -> Footprint:
    """A model of 64 tokens of context at one byte per element."""
    heads = max(1, *(k.kv_heads for k in kv))
    geometry = Geometry(hidden=1, vocab=1, heads=heads, max_context=64, softcap=False, kv=kv)
    return Footprint("toy", "fp16", False, "float16", tuple(modules), geometry)


def toy_module(
    name: str, role: Role, size: int, *, work: int = 0, storage: str | None = None, stack: str = "layers"
) -> Module:
    """A module of one tensor."""
    weight = f"{name}.weight"
    return Module(name, role, (Tensor(weight, storage or weight, (size,), 1, False, size),), work, stack=stack)


def toy_problem(
    footprint: Footprint, budgets: Sequence[int], speeds: Sequence[int] | None = None, **question: Any
) -> Problem:
    """Blocks of one token and no reserve, so that a budget is weights + KV."""
    rates = speeds or [1] * len(budgets)
    devices = tuple(
        Gpu(f"toy{i}", max(budget, 1), speed=rates[i], device_type="cpu") for i, budget in enumerate(budgets)
    )
    return _Free.of(Question(footprint, devices, tuple(budgets), ONE_TOKEN_BLOCKS, **question))


class _Free(Problem):
    """Without any reserve."""

    @classmethod
    def of(cls, question: Question) -> Problem:
        priced = super().of(question)
        return replace(priced, reserves=(NOTHING,) * len(priced.reserves))


@contextmanager
def small_sampler() -> Iterator[None]:
    """The sampler's table and the padding of its vocabulary suit real models: for toys they shrink to 8 bytes and to
    nothing, so that a reserve on the CPU is some hundred bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reserve, "_WEIGHT_TABLE_BYTES", 8)
        patch.setattr(reserve, "_SEGMENT", 1)
        yield
