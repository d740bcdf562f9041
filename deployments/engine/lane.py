"""A lane: one stage on its GPU, with the buffers that its steps come in by and the graphs that run them.

Steps enter a lane in launch order and run on the device's one compute stream, so all slots share the buffers and the
graphs. A step of single-token rows runs as one graph, a step with prompt chunks as a graph of another kind up to
`forms.MOST_CAPTURED_ROWS`; beyond that one device is slower than the host, and a graph would save nothing. With several
devices the host launches for all of them, while each has a part of the layers: there steps of all sizes have graphs.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from deployments.engine.attention import RowSpan, StepLayout
from deployments.engine.capture import capture
from deployments.engine.compiled import compile_layers
from deployments.engine.forms import Form, chunked, drawn, forms, large_sizes, mixed, usual
from deployments.engine.greedy import GreedyDraws
from deployments.engine.inputs import Inputs, continue_ids, pack, packed_size
from deployments.engine.stages import Stage, StepRows

log = logging.getLogger(__name__)

_TIMED_RUNS = 5
_VIEWS = 128
"""Of a buffer's first rows, that are kept: more than there are graphs."""
_SMALL_STEP_BYTES = 256 * 2**20
"""More than a step of a few rows takes: libraries make their workspaces in it, and weights are dequantised."""


class Lane:
    """Runs one stage's steps on its GPU.

    Args:
        stage: loaded, with its attention backend.
        block_size: tokens per KV block.
        max_batch_tokens: most rows of a step.
        max_sequences: most rows of a step that decodes.
        lanes: of the replica.
        note: takes ids and cache slots, each int64 [rows], of every step before its layers run, as part of its graph;
            padding has the scratch block's slot.
    """

    def __init__(
        self,
        stage: Stage,
        *,
        block_size: int,
        max_batch_tokens: int,
        max_sequences: int,
        lanes: int = 1,
        note: Callable[[Tensor, Tensor], None] | None = None,
    ) -> None:
        self.stage = stage
        self.device = stage.device
        self.current = torch.cuda.device(stage.device)
        """Makes it the current one, once at a time; made once, as there is a step for it every millisecond."""
        self.compile_error: str | None = None
        """Why layers or what is around them run without torch.compile once `warm` was called; None: they do not."""
        self._packed = torch.zeros(packed_size(max_batch_tokens), dtype=torch.int64, device=self.device)
        """`Inputs` of the step."""
        self._inputs = lru_cache(_VIEWS)(partial(Inputs.view, self._packed))
        self._note = note
        self._block_size = block_size
        self._scratch_slot = stage.kv[0].scratch * block_size
        self.forms = forms(max_batch_tokens=max_batch_tokens, max_sequences=max_sequences, lanes=lanes)
        """Of the graphs."""
        # What attention by PyTorch takes grows with a sequence, and padding is one: no larger ones than graphs have.
        beyond = stage.attention.capturable
        self.mixed = mixed(max_batch_tokens=max_batch_tokens, max_sequences=max_sequences, lanes=lanes, beyond=beyond)
        """Steps with chunks to time."""
        self.timed_blocks = stage.kv[0].scratch if beyond else 0
        """KV blocks to time the reading of; none with PyTorch's attention, which gathers them first."""
        self._usual = usual(max_batch_tokens=max_batch_tokens, max_sequences=max_sequences)
        self._incoming: Tensor | None = None
        if not stage.is_first:
            shape = (1, max(form.rows for form in self.forms), stage.hidden_size)
            self._incoming = torch.zeros(shape, dtype=stage.dtype, device=self.device)
        self._outgoing: Tensor | None = None
        """Of all graphs, once there is one: results of their own would add up."""
        self._arriving = lru_cache(_VIEWS)(lambda rows: _front(self._incoming, rows))
        self._leaving = lru_cache(_VIEWS)(lambda rows: _front(self._outgoing, rows))
        """Their first rows: a view takes the host some microseconds, and a step needs several on each GPU."""
        # One for all captures: cuBLAS keeps a workspace for each stream that it was ever called on.
        self._side = torch.cuda.Stream(self.device)
        self._graphs: dict[Form, torch.cuda.CUDAGraph] = {}
        self._large = tuple(chunked(rows, max_sequences) for rows in large_sizes(max_batch_tokens))
        self._drawn = tuple(form.rows for form in self.forms if form.sequences is None)
        """Rows that the head takes: those of the first forms, in order."""
        self._greedy: GreedyDraws | None = None
        """On the last lane, once there are graphs."""

    @torch.inference_mode()
    def warm(self, progress: Callable[[int, int], None]) -> None:
        """Compile the layers and capture the graphs; `progress` hears (done, all)."""
        if self.stage.attention.compilable:
            self.compile_error = compile_layers(self.stage.layer_modules, self._attempt) or compile_layers(
                self.stage.surroundings, self._attempt, called="norms and rotary tables around the layers"
            )
        else:
            self.compile_error = (
                f"attention by {self.stage.attention.name} is no operator that compiled code could call"
            )
        if not self.stage.attention.capturable:
            log.info("attention by %s can't be captured: steps run without CUDA graphs", self.stage.attention.name)
            return
        pool = torch.cuda.graph_pool_handle()
        # The largest first: the others fit in its memory.
        for done, form in enumerate(sorted(self.forms, key=lambda form: -form.rows)):
            progress(done, len(self.forms))
            self._graphs[form] = self._capture(form, pool)
        if self.stage.is_last and self._outgoing is not None:
            # In the same memory: a step's layers are done when its head begins.
            self._greedy = GreedyDraws(
                self.stage.logits,
                self._outgoing,
                self._drawn,
                lambda queue: capture(queue, pool=pool, stream=self._side),
            )
        self._meet()
        torch.cuda.synchronize(self.device)

    def form(self, step: StepRows) -> Form | None:
        """Of the graph that runs a step, on this lane and all others of the replica; None: no graph does."""
        large_enough = self.forms[bisect_left(self._drawn, len(step.ids)) :]
        return next((form for form in large_enough if form.fits(step) and form in self._graphs), None)

    def run(
        self, step: StepRows, layout: StepLayout, form: Form | None, last_ids: Tensor | None, incoming: Tensor | None
    ) -> Tensor:
        """Queue a step on the device, in inference mode; nothing here waits for it.

        Args:
            layout: of the step, as `form` pads it.
            form: of the graph that runs it.
            last_ids: int64 [rows], here: what the slot's step before drew; None where none is pending.
            incoming: what the lane before returned, here; None on the first.

        Returns:
            [1, T or the form's rows, hidden], the step's rows in front; overwritten by the next step.
        """
        with self.current:
            inputs = self._load(step, layout, len(step.ids) if form is None else form.rows, last_ids)
            self.stage.attention.prepare(layout)
            if form is None:
                return self._compute(inputs, incoming)
            if incoming is not None:
                self._arriving(form.rows).copy_(incoming)
            self._graphs[form].replay()
            return self._leaving(form.rows)

    def logits(self, step: StepRows, hidden: Tensor) -> Tensor:
        """[sampled rows, vocab] of what `run` returned, on the last lane, its device the current one, in inference
        mode; at least one row is sampled.

        By no graph: those of all sizes would keep their logits, half a GB where a vocabulary is large. The head takes
        few numbers of rows, all met by `warm`: a product of another size may be a kernel that is yet to be loaded, and
        while one is, CUDA lets the host wait for the device.
        """
        picked = self._picked(step, hidden)
        if isinstance(picked, int):
            hidden = hidden[:, :picked]
        else:
            index = torch.tensor(picked, dtype=torch.int64, pin_memory=True)
            hidden = hidden[:, index.to(self.device, non_blocking=True)]
        return self.stage.logits(hidden)[: len(step.sampled)]

    def likeliest(self, step: StepRows, hidden: Tensor) -> Tensor | None:
        """What `GreedyDraws.draw` finds in the sampled rows of what `run` returned, by a graph, on the last lane, its
        device the current one; None: no graph does. One does where a graph ran the layers, and all rows are sampled."""
        if self._greedy is None or not self._greedy.reads(hidden):
            return None
        picked = self._picked(step, hidden)
        return self._greedy.draw(picked, len(step.sampled)) if isinstance(picked, int) else None

    def _picked(self, step: StepRows, hidden: Tensor) -> int | tuple[int, ...]:
        return drawn(step.sampled, of=len(step.ids), there=hidden.shape[1], sizes=self._drawn)

    @torch.inference_mode()
    def microseconds(self, form: Form, spans: tuple[RowSpan, ...] = ()) -> int:
        """How long a step of a form takes; by a graph where there is one.

        Args:
            spans: decodes of the step, which write to blocks that nobody uses yet; its other rows are padding.
        """
        with self.current:
            inputs = self._prepare_scratch(form, spans)
            graph = self._graphs.get(form)
            return self._timed(partial(self._compute, inputs, self._incoming) if graph is None else graph.replay)

    @torch.inference_mode()
    def head_microseconds(self, rows: int) -> int:
        """How long the head and a greedy draw take for so many rows, one of the sizes that have a graph; 0 where there
        is none."""
        with self.current:
            return self._timed(partial(self._greedy.draw, rows, rows)) if self._greedy else 0

    def _timed(self, queue: Callable[[], object]) -> int:
        """Microseconds, the median of some runs, one behind the other as steps are."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(1 + _TIMED_RUNS)]
        queue()  # not timed: it may load what it runs, and lets the device's clock rise
        events[0].record()
        for event in events[1:]:
            queue()
            event.record()
        torch.cuda.synchronize(self.device)
        times: list[float] = sorted(before.elapsed_time(after) for before, after in pairwise(events))
        return round(1e3 * times[_TIMED_RUNS // 2])

    def _meet(self) -> None:
        """Run what no graph holds, in a few sizes, so that requests hardly wait for what is compiled or loaded."""
        for form in self._large:
            if form not in self._graphs:
                self._compute(self._prepare_scratch(form), self._incoming)
        if self.stage.is_last and self._outgoing is not None:
            for rows in self._drawn:
                self.stage.logits(self._outgoing[:, :rows])

    def _load(self, step: StepRows, layout: StepLayout, rows: int, last_ids: Tensor | None) -> Inputs:
        """Upload a step's inputs, padded to `rows`."""
        if Inputs not in layout.shared:
            layout.shared[Inputs] = pack(step, rows, self._block_size, self._scratch_slot, pinned=True)
        inputs = self._inputs(rows)
        inputs.packed.copy_(layout.shared[Inputs], non_blocking=True)
        if last_ids is not None:
            continue_ids(inputs.ids, step.ids, last_ids)
        return inputs

    def _compute(self, inputs: Inputs, incoming: Tensor | None) -> Tensor:
        """[1, rows, hidden] of the stage's layers on the inputs' rows."""
        if self._note is not None:
            self._note(inputs.ids, inputs.cache_slots)
        source = inputs.ids[None] if incoming is None else incoming[:, : len(inputs.ids)]
        return self.stage.hidden(source, inputs.positions[None])

    def _attempt(self) -> None:
        """Steps of one row, of few and of many, over the scratch block.

        Raises:
            RuntimeError: the one row took memory as if it had copied KV blocks, as compiled code may that can't tell
                that it may write in place. More rows may take as much for other reasons.
        """
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        one, *more = self._usual
        self._compute(self._prepare_scratch(one), self._incoming)
        torch.cuda.synchronize(self.device)
        taken, blocks = torch.cuda.max_memory_allocated(self.device) - before, self.stage.kv[0].bytes // 2
        if taken > max(blocks, _SMALL_STEP_BYTES):
            raise RuntimeError(f"a row took {taken:,} bytes, and a layer's keys are {blocks:,}: they were copied")
        for form in more:
            self._compute(self._prepare_scratch(form), self._incoming)
        torch.cuda.synchronize(self.device)

    def _capture(self, form: Form, pool: Any) -> torch.cuda.CUDAGraph:
        inputs = self._prepare_scratch(form)
        if self._outgoing is None:  # of the largest graph; OPT's last hidden states may be narrower than its layers'
            self._outgoing = torch.zeros_like(self._compute(inputs, self._incoming))
        outgoing = self._outgoing[:, : form.rows]
        return capture(lambda: outgoing.copy_(self._compute(inputs, self._incoming)), pool=pool, stream=self._side)

    def _prepare_scratch(self, form: Form, spans: tuple[RowSpan, ...] = ()) -> Inputs:
        """Rows that are all padding, but for what attention reads and writes for those of `spans`."""
        self.stage.attention.prepare(form.layout(spans, len(spans), self._block_size))
        inputs = self._inputs(form.rows)
        inputs.clear(self._scratch_slot)
        return inputs


def _front(buffer: Tensor | None, rows: int) -> Tensor:
    assert buffer is not None, "a graph runs once all are captured, and takes rows from another lane but on the first"
    return buffer[:, :rows]
