"""Pinned memory that the attention backends' uploads come from, one part for each step in flight."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from deployments.engine.attention_tables import Shape, Tables
from deployments.engine.flashinfer_kernels import Planned


@dataclass(eq=False)
class HostStep:
    """One step on the host, for all devices: its tables, and its plans as they are made."""

    staging: Staging
    shape: Shape
    plans: dict[Hashable, Planned] = field(default_factory=dict)
    """By kind of layer, model of device, and part."""

    @cached_property
    def tables(self) -> Tensor:
        """int32 [size of the shape]: what is uploaded."""
        return self.staging.tables[: self.shape.size]

    @cached_property
    def parts(self) -> tuple[Tables, ...]:
        """What is planned. Not looked at in a step whose every part needs no plan."""
        return Tables.view(self.staging.tables, self.shape).parts()


@dataclass(eq=False)
class Staging:
    """The memory of one step at a time."""

    tables: Tensor
    """int32."""
    plans: dict[Hashable, Tensor] = field(default_factory=dict)
    """uint8, by kind of layer, model of device, and part."""
    copied: defaultdict[torch.device, torch.cuda.Event] = field(default_factory=lambda: defaultdict(torch.cuda.Event))
    """Pass once what was copied from here has arrived; the same ones for each step."""
    step: weakref.ref[HostStep] | None = None

    @property
    def free(self) -> bool:
        """Whether its step is over, and all copies from it."""
        return (self.step is None or self.step() is None) and all(event.query() for event in self.copied.values())


class StagingPool:
    """Memory of all steps in flight, used again once a step's copies are done. Nothing waits for it: when none is free
    there is one more step in flight than ever before, and the pool grows.

    Args:
        size: integers of the largest step's tables.
        pinned: whether the memory is pinned, as copies to CUDA devices want it.
    """

    def __init__(self, size: int, *, pinned: bool) -> None:
        self._size = size
        self._pinned = pinned
        self._all: list[Staging] = []

    def __len__(self) -> int:
        return len(self._all)

    def take(self) -> Staging:
        """Memory that nothing is copied from any more."""
        found = next((staging for staging in self._all if staging.free), None)
        if found is None:
            found = Staging(self._zeros(self._size, torch.int32))
        else:
            self._all.remove(found)
        self._all.append(found)  # behind the others: the one that was taken longest ago is the first to be free
        return found

    def plan(self, staging: Staging, key: Hashable, size: int) -> Tensor:
        """The part of `staging` that the plan named `key` is written to: uint8 [size]."""
        if key not in staging.plans:
            staging.plans[key] = self._zeros(size, torch.uint8)
        return staging.plans[key]

    def _zeros(self, size: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(size, dtype=dtype, pin_memory=self._pinned)
