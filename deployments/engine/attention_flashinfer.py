"""The FlashInfer backend: paged attention on CUDA, planned on the host once per step and kind of layer.

Blocks newly taken may hold NaN that another request left, and need no clearing: FlashInfer masks by length. Behind a
sequence's last token its kernels load values as zeros, and keys as they come but with their scores set to minus
infinity before anything is made of them.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from deployments.engine.attention import AttentionBackend, Scoring, StepLayout
from deployments.engine.attention_staging import HostStep, StagingPool
from deployments.engine.attention_tables import PARTS, Shape, Tables, pack
from deployments.engine.flashinfer_fit import Kind, Room
from deployments.engine.flashinfer_kernels import OWN, Call, Planned, Progress, Workspace

log = logging.getLogger(__name__)


class Kernels(Protocol):
    """What the backend asks of the kernels on a device; see `FlashInferKernels`."""

    @property
    def model(self) -> Hashable:
        """Devices of one model can share plans."""

    def room(self, kind: Kind, *, sequences: int, rows: int) -> Room:
        """Memory for steps of up to so many sequences and rows."""

    def compile(self, kinds: Iterable[Kind], progress: Progress) -> None:
        """Make ready to run `kinds`."""

    def plan(self, kind: Kind, host: Tables, block_size: int, space: Workspace, pinned: Tensor) -> Planned:
        """Distribute a step over the device, through `pinned`."""

    def append(self, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, tables: Tables) -> None:
        """Write rows to the blocks."""

    def run(self, call: Call, query: Tensor, keys: Tensor, values: Tensor, out: Tensor) -> None:
        """Attend over the blocks, with the call's rows of the step."""

    def takes_decodes(self, kind: Kind, shape: Shape, splits: int) -> bool:
        """Whether `attend_decodes` is what sequences of one row, or none, should run."""

    def attend_decodes(
        self, call: Call, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, out: Tensor
    ) -> None:
        """`append` and `run` in one, of the call's sequences, for which `takes_decodes` is true."""


@dataclass(frozen=True)
class Limits:
    """The largest steps that a replica takes: buffers are made for them once, because graphs keep their places."""

    max_sequences: int
    max_rows: int
    """Padding included."""
    max_blocks_per_sequence: int
    splits: int = 64
    """Of the keys of a step's decodes, beyond one for each."""

    @property
    def table_size(self) -> int:
        """Integers of the largest step's tables. Each padding row is a sequence of one block."""
        pages = self.max_sequences * self.max_blocks_per_sequence + self.max_rows
        return Shape(self.max_rows, self.max_rows, pages).size


class FlashInferAttention(AttentionBackend):
    """Paged attention by FlashInfer's kernels on one device.

    Which kinds of layers there are it learns from the first step that runs them. From then on `prepare` plans them all,
    so that a captured graph may be replayed.

    Args:
        block_size: tokens per KV block.
        num_blocks: blocks of sequences, and so the id of the scratch block behind them.
        limits: of the largest step.
        device: where the blocks are.
        kernels: of this device.
        pool: shared by all stages' backends.
    """

    name = "flashinfer"
    capturable = True

    def __init__(
        self,
        block_size: int,
        num_blocks: int,
        limits: Limits,
        device: torch.device,
        kernels: Kernels,
        pool: StagingPool,
    ) -> None:
        super().__init__()
        self._block_size = block_size
        self._scratch = num_blocks
        self._limits = limits
        self._device = device
        self._kernels = kernels
        self._pool = pool
        self._buffer = torch.zeros(limits.table_size, dtype=torch.int32, device=device)
        self._tables: Tables | None = None
        self._parts: tuple[Tables, ...] = ()
        self._step: HostStep | None = None
        self._warm: set[Kind] = set()
        self._floats: dict[int, Tensor] = {}
        """By size: layers follow each other, so kinds share them."""
        self._spaces: dict[Kind, tuple[Workspace, ...]] = {}
        """One for each part of a step."""
        self._planned: dict[Kind, list[Planned]] = {}
        self._captured: dict[tuple[Kind, int, int, bool], tuple[int, ...]] = {}
        """By sequences, rows, and whether they are a graph's of any steps: the `Planned.info` that a graph may keep."""
        self._unplanned: dict[int, dict[Kind, list[Planned]]] = {}
        """`_planned` of steps that decode and need no plan, by sequences; of the kinds there are."""
        self._stream = torch.cuda.default_stream(device) if device.type == "cuda" else None

    @property
    def bytes(self) -> int:
        """Device memory held beside the blocks."""
        plans = [space.ints for spaces in self._spaces.values() for space in spaces]
        return sum(tensor.nbytes for tensor in (self._buffer, *self._floats.values(), *plans))

    def warm(self, kinds: Iterable[Kind], progress: Progress) -> None:
        """Load the kernels of `kinds`, compiling what the cache does not have; `progress` hears of each.

        Raises:
            ConfigError: a kernel does not compile.
        """
        new = [kind for kind in dict.fromkeys(kinds) if kind not in self._warm]
        if new:
            self._kernels.compile(new, progress)
            self._warm.update(new)

    def prepare(self, layout: StepLayout) -> None:
        """Upload the step's tables and plan all kinds of layers; what another stage's backend did is taken over. The
        current stream must be the device's default one.

        Raises:
            ValueError: the step is larger than the limits.
        """
        step = self._host_step(layout)
        self._buffer[: step.shape.size].copy_(step.tables, non_blocking=True)
        self._tables = None
        self._step = step
        unplanned = self._unplanned.get(step.shape.sequences) if step.shape.decodes else None
        self._planned = self._plan_all(step) if unplanned is None else unplanned
        if self._stream is not None:
            step.staging.copied[self._device].record(self._stream)

    @torch.inference_mode()
    def attend(self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, how: Scoring) -> Tensor:
        """See `AttentionBackend.attend`."""
        step = self._step
        if step is None:
            raise RuntimeError("no step was prepared for")
        tables = self._tables or self._view(step)
        _, heads, rows, head_dim = query.shape
        if rows != tables.shape.rows:
            raise ValueError(f"attention got {rows} rows in a step that was prepared for {tables.shape.rows}")
        kind = Kind(heads, keys.shape[2], head_dim, query.dtype, keys.dtype, how.window, how.softcap)
        planned = self._planned.get(kind) or self._learn(kind, step)
        out = torch.empty(rows, heads, head_dim, dtype=query.dtype, device=query.device)
        if planned != [OWN]:
            self._kernels.append(_rows(key), _rows(value), keys, values, tables)
        for plan, part, space in zip(planned, self._parts, self._spaces[kind], strict=False):
            call = Call(kind, plan, part, space, how.scale, self._limits.splits)
            if plan is OWN:
                self._kernels.attend_decodes(call, _rows(query), _rows(key), _rows(value), keys, values, out)
            else:
                self._kernels.run(call, _rows(query), keys, values, out)
        return out[None]

    def _view(self, step: HostStep) -> Tables:
        """The step's tables on the device. Replayed graphs have their own views, so a step may well need none."""
        self._tables = Tables.view(self._buffer, step.shape)
        self._parts = self._tables.parts()
        return self._tables

    def _host_step(self, layout: StepLayout) -> HostStep:
        if FlashInferAttention not in layout.shared:
            staging = self._pool.take()
            spans, numbers = layout.padded(self._scratch), staging.tables.numpy()
            shape = pack(spans, self._block_size, numbers, splits=self._limits.splits)
            if shape.rows > self._limits.max_rows:
                raise ValueError(f"a step has {shape.rows} rows, and attention was made for {self._limits.max_rows}")
            captured = layout.sequences is not None
            if captured or shape.rows > shape.sequences:
                rows = layout.ahead
                ahead = (layout.decodes or 0) if captured else rows
                shape = replace(shape, captured=captured, ahead=ahead, before=rows)
            step = layout.shared[FlashInferAttention] = HostStep(staging, shape)
            staging.step = weakref.ref(step)
        found: HostStep = layout.shared[FlashInferAttention]
        return found

    @torch.inference_mode()
    def _plan_all(self, step: HostStep) -> dict[Kind, list[Planned]]:
        planned = {kind: self._plan(kind, step) for kind in self._spaces}
        if step.shape.decodes and all(plans == [OWN] for plans in planned.values()):
            self._unplanned[step.shape.sequences] = planned
        return planned

    def _plan(self, kind: Kind, step: HostStep) -> list[Planned]:
        """A plan for each part of the step, or the word that it needs none: decodes are the first part, or all."""
        first, *more = step.shape.parts()
        own = bool(first.decodes or more) and self._kernels.takes_decodes(kind, first, self._limits.splits)
        planned = [OWN if own else self._plan_part(kind, step, 0)]
        return planned + [self._plan_part(kind, step, part) for part in range(1, 1 + len(more))]

    def _plan_part(self, kind: Kind, step: HostStep, part: int) -> Planned:
        """Plan for this model of device, or copy what a stage on another device of the model has planned."""
        key, tables = (kind, self._kernels.model, part), step.parts[part]
        space, shape = self._spaces[kind][part], tables.shape
        pinned = self._pool.plan(step.staging, key, space.ints.nbytes)
        planned = step.plans.get(key)
        if planned is None:
            planned = step.plans[key] = self._kernels.plan(kind, tables, self._block_size, space, pinned)
            if shape.decodes or shape.captured:
                self._check_graphs(kind, shape, tuple(planned.info))
        else:
            used = self._kernels.room(kind, sequences=shape.sequences, rows=shape.rows).ints
            space.ints[:used].copy_(pinned[:used], non_blocking=True)
        return planned

    def _check_graphs(self, kind: Kind, shape: Shape, info: tuple[int, ...]) -> None:
        """A graph keeps the plan's sizes and places that it was captured with; they must be those of every plan."""
        before = self._captured.setdefault((kind, shape.sequences, shape.rows, shape.captured), info)
        if info != before:
            raise RuntimeError(
                f"FlashInfer plans {shape.rows} rows of {shape.sequences} sequences as {list(info)}, where it planned "
                f"{list(before)} before: a CUDA graph of them would read the wrong memory"
            )

    def _learn(self, kind: Kind, step: HostStep) -> list[Planned]:
        """A kind that was not there when the step was prepared."""
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"{kind} first appears in a CUDA graph's capture; run a step without a graph before")
        self.warm([kind], log.info)
        self._spaces[kind] = self._workspaces(kind)
        self._unplanned.clear()
        self._planned[kind] = self._plan(kind, step)
        if self._device.type == "cuda":  # what runs here comes behind the tables' copy, whichever stream it is on
            step.staging.copied[self._device].record(torch.cuda.current_stream(self._device))
        return self._planned[kind]

    def _workspaces(self, kind: Kind) -> tuple[Workspace, ...]:
        room = self._kernels.room(kind, sequences=self._limits.max_rows, rows=self._limits.max_rows)
        if room.floats not in self._floats:
            self._floats[room.floats] = torch.zeros(room.floats, dtype=torch.uint8, device=self._device)
        plans = [torch.zeros(room.ints, dtype=torch.uint8, device=self._device) for _ in range(PARTS)]
        return tuple(Workspace(self._floats[room.floats], ints) for ints in plans)


def flashinfer_backends(
    block_size: int, num_blocks: int, limits: Limits, devices: Iterable[tuple[torch.device, Kernels]]
) -> tuple[FlashInferAttention, ...]:
    """A backend for each stage's device, in order; they share pinned memory and plans."""
    stages = list(devices)
    pool = StagingPool(limits.table_size, pinned=stages[0][0].type == "cuda")
    return tuple(FlashInferAttention(block_size, num_blocks, limits, *stage, pool) for stage in stages)


def _rows(heads_first: Tensor) -> Tensor:
    """[1, heads, T, head_dim] as [T, heads, head_dim], a head's elements next to each other."""
    rows = heads_first[0].transpose(0, 1)
    return rows if rows.stride(-1) == 1 else rows.contiguous()
