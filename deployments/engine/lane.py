"""A lane: one stage on its GPU, with the buffers that its steps come in by and the graphs that run them.

Steps enter a lane in launch order and run on the device's one compute stream, so all slots share the buffers and the
graphs. A step of single-token rows runs as one graph of the next larger bucket; other steps run without a graph.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from deployments.engine.attention import RowSpan, StepLayout
from deployments.engine.compiled import compile_layers
from deployments.engine.stages import Stage, StepRows

log = logging.getLogger(__name__)

_SMALL_BUCKETS = (1, 2, 4, 8)
_WARM_UPS = 2
"""Runs before a capture: libraries choose algorithms and take their workspaces at the first ones."""


def buckets(most: int) -> tuple[int, ...]:
    """Batch sizes that get a graph, up to `most` rows: powers of two, then steps that waste at most a third."""
    sizes = {*_SMALL_BUCKETS, *range(16, 64, 8), *range(64, 128, 16), *range(128, most + 32, 32)}
    return tuple(sorted({min(size, most) for size in sizes}))


@dataclass(frozen=True, slots=True)
class Computed:
    """What a lane made of a step; overwritten by its next step."""

    hidden: Tensor
    """[1, T, hidden], T with padding."""
    logits: Tensor | None
    """[sampled rows, vocab] on the last lane, else None."""


class Lane:
    """Runs one stage's steps on its GPU.

    Args:
        stage: loaded, with its attention backend.
        block_size: tokens per KV block.
        max_batch_tokens: most rows of a step.
        max_sequences: most rows of a step that decodes.
    """

    def __init__(self, stage: Stage, *, block_size: int, max_batch_tokens: int, max_sequences: int) -> None:
        self.stage = stage
        self.device = stage.device
        self._block_size = block_size
        self._buckets = buckets(min(max_sequences, max_batch_tokens))
        rows = max(max_batch_tokens, self._buckets[-1])
        self.ids = torch.zeros(rows, dtype=torch.int64, device=self.device)
        """Tokens of the step; on the first and the last lane."""
        self.cache_slots = torch.zeros_like(self.ids)
        """Block * block_size + offset of each token; on the last lane."""
        self._positions = torch.zeros_like(self.ids)
        self._hidden = None
        if not stage.is_first:
            self._hidden = torch.zeros(1, rows, stage.hidden_size, dtype=stage.dtype, device=self.device)
        # One for all captures: cuBLAS keeps a workspace for each stream that it was ever called on.
        self._side = torch.cuda.Stream(self.device)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Computed]] = {}
        self.compile_error: str | None = None
        """Why the layers run without torch.compile, once `warm` was called; None: they don't."""

    @property
    def captured(self) -> int:
        """Graphs there are."""
        return len(self._graphs)

    @torch.inference_mode()
    def warm(self, progress: Callable[[int, int], None]) -> None:
        """Compile the layers and capture a graph for each bucket; `progress` hears (done, all)."""
        self.compile_error = compile_layers(self.stage.layer_modules, self._attempt)
        if not self.stage.attention.capturable:
            log.info("attention by %s can't be captured: decodes run without CUDA graphs", self.stage.attention.name)
            return
        pool = torch.cuda.graph_pool_handle()
        for done, rows in enumerate(reversed(self._buckets)):  # the largest first: the others fit in its memory
            progress(done, len(self._buckets))
            self._graphs[rows] = self._capture(rows, pool)
        torch.cuda.synchronize(self.device)

    def run(self, step: StepRows, layout: StepLayout, last_ids: Tensor | None, incoming: Tensor | None) -> Computed:
        """Queue a step on the device; nothing here waits for it.

        Args:
            last_ids: int64 [rows], here: what the slot's step before drew; None where none is pending.
            incoming: [1, T or more, hidden], here, from the lane before; None on the first.
        """
        rows = len(step.ids)
        bucket = self._bucket(step)
        padding = 0 if bucket is None else bucket - rows
        self._load(step, last_ids)
        self.stage.attention.prepare(replace(layout, padding=padding))
        if bucket is None:
            return self._compute(rows, step.sampled, incoming)
        if self._hidden is not None:
            assert incoming is not None
            self._hidden[:, :rows].copy_(incoming[:, :rows])
        graph, computed = self._graphs[bucket]
        graph.replay()
        if computed.logits is None:
            return computed
        return Computed(computed.hidden, computed.logits[:rows])

    def _bucket(self, step: StepRows) -> int | None:
        """The graph that can run a step, by its rows."""
        rows = len(step.ids)
        if len(step.spans) < rows or len(step.sampled) < rows:
            return None
        return next((size for size in self._buckets if size >= rows and size in self._graphs), None)

    def _load(self, step: StepRows, last_ids: Tensor | None) -> None:
        rows = len(step.ids)
        _upload(step.positions, self._positions)
        if self.stage.is_last:
            _upload(_cache_slots(step, self._block_size), self.cache_slots)
        if not (self.stage.is_first or self.stage.is_last):
            return
        _upload(step.ids, self.ids)
        if last_ids is not None:
            ids = self.ids[:rows]
            torch.where(ids < 0, last_ids[(-1 - ids).clamp_(min=0)], ids, out=ids)

    def _compute(self, rows: int, sampled: Sequence[int] | None, incoming: Tensor | None) -> Computed:
        """Run the stage on the first `rows` rows; `sampled` None: all rows are."""
        stage = self.stage
        source = self.ids[None, :rows] if incoming is None else incoming[:, :rows]
        hidden = stage.hidden(source, self._positions[None, :rows])
        if not stage.is_last:
            return Computed(hidden, None)
        if sampled is None:
            return Computed(hidden, stage.logits(hidden))
        if not sampled:
            return Computed(hidden, None)
        wanted = hidden
        if len(sampled) < rows:
            index = torch.empty(len(sampled), dtype=torch.int64, device=self.device)
            _upload(sampled, index)
            wanted = hidden[:, index]
        return Computed(hidden, stage.logits(wanted))

    def _attempt(self) -> None:
        """Steps of one row and of several, over the scratch block."""
        for rows in (1, 2, 3):
            self._prepare_scratch(rows)
            self._compute(rows, None, self._hidden)
        torch.cuda.synchronize(self.device)

    def _capture(self, rows: int, pool: Any) -> tuple[torch.cuda.CUDAGraph, Computed]:
        self._prepare_scratch(rows)
        compute = torch.cuda.current_stream(self.device)
        self._side.wait_stream(compute)
        with torch.cuda.stream(self._side):
            for _ in range(_WARM_UPS):
                self._compute(rows, None, self._hidden)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=self._side):
            computed = self._compute(rows, None, self._hidden)
        compute.wait_stream(self._side)
        return graph, computed

    def _prepare_scratch(self, rows: int) -> None:
        """Rows that are all padding."""
        scratch = self.stage.kv[0].scratch
        self.stage.attention.prepare(StepLayout((RowSpan(0, 1, (scratch,)),), self._block_size, rows - 1))
        self.ids[:rows] = 0
        self._positions[:rows] = 0


def _upload(values: Sequence[int], target: Tensor) -> None:
    """Queue a copy of integers into the first elements of `target`, on the current stream.

    PyTorch hands pinned memory out again only after the copies from it are done.
    """
    target[: len(values)].copy_(torch.tensor(values, dtype=target.dtype, pin_memory=True), non_blocking=True)


def _cache_slots(step: StepRows, block_size: int) -> list[int]:
    return [
        span.block_table[position // block_size] * block_size + position % block_size
        for span in step.spans
        for position in range(span.start, span.start + span.count)
    ]
