"""The stages on their GPUs: one thread launches, no step waits for the host, and the host reads one step late.

Each GPU has one compute stream (its default one), on which all slots' steps follow each other. Copies from GPU to GPU
are on streams beside those of both. Events alone order the GPUs: a stage starts when its
input has arrived, the first stage when the ids that it continues from have. So with as many slots in flight as stages,
all of them work.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import pairwise
from typing import Protocol

import torch

from deployments.engine.attention import RowSpan, StepLayout
from deployments.engine.budget import Chunks, counted_decodes, measured_chunks
from deployments.engine.draw import Draw
from deployments.engine.flight import Draws, Flight
from deployments.engine.forms import Form
from deployments.engine.lane import Lane
from deployments.engine.link import Link
from deployments.engine.rehearsal import rehearsed
from deployments.engine.sampler import Sampler
from deployments.engine.stages import Stage, StepRows

log = logging.getLogger(__name__)

_ROWS_WITHOUT_GRAPHS = 256
"""Of rehearsed steps where attention goes from sequence to sequence, and one of all rows may take seconds."""


class CudaPipeline:
    """Launches steps through the stages, each on a GPU of its own.

    Args:
        stages: in layer order.
        sampler: on the last stage's device.
        block_size: tokens per KV block.
        max_batch_tokens: most rows of a step.
        max_sequences: most rows of a step that decodes.
        max_context: most tokens of a sequence.
    """

    lookahead = 1
    busy_s: tuple[float, ...] = ()
    """Not measured: the host does not wait for stages one by one."""

    def __init__(
        self,
        stages: tuple[Stage, ...],
        sampler: Sampler,
        *,
        block_size: int,
        max_batch_tokens: int,
        max_sequences: int,
        max_context: int,
    ) -> None:
        self.depth = len(stages)
        self._block_size = block_size
        self._lanes = [
            Lane(
                stage,
                block_size=block_size,
                max_batch_tokens=max_batch_tokens,
                max_sequences=max_sequences,
                lanes=self.depth,
                note=sampler.note_inputs if stage is stages[-1] else None,
            )
            for stage in stages
        ]
        self._links = [
            Link(
                before.device,
                after.device,
                slots=self.depth,
                shape=(1, max_batch_tokens, after.hidden_size),
                dtype=after.dtype,
            )
            for before, after in pairwise(stages)
        ]
        self._returns = None
        if self.depth > 1:
            self._returns = Link(
                stages[-1].device, stages[0].device, slots=self.depth, shape=(max_sequences,), dtype=torch.int64
            )
        self._draws = Draws(sampler, self._returns, slots=self.depth)
        self._warm()
        self.chunks = measure_chunks(
            self._lanes[0],
            block_size=block_size,
            max_batch_tokens=max_batch_tokens,
            max_sequences=max_sequences,
            max_context=max_context,
        )
        """Prompt tokens of a step that keep it within `CHUNK_SLOWDOWN` times one that only decodes."""
        first = stages[0]
        steps = rehearsed(
            rows=max_batch_tokens if first.attention.capturable else min(max_batch_tokens, _ROWS_WITHOUT_GRAPHS),
            sequences=max_sequences,
            length=min(block_size, max_context),
            scratch=first.kv[0].scratch,
            vocab=sampler.vocab_size,
        )
        self._rehearse(list(steps))

    @torch.inference_mode()
    def launch(self, slot: int, step: StepRows, draw: Draw) -> Flight:
        """Queue a step on all GPUs; returns at once."""
        first = self._lanes[0]
        form = first.form(step)
        if form is None:
            layout = StepLayout(step.spans, self._block_size)
        else:
            layout = form.layout(step.spans, len(step.ids), self._block_size)
        pending = min(step.ids) < 0
        last_ids = self._draws.last_ids(slot) if pending else None
        returned = last_ids
        if last_ids is not None and self._returns is not None:
            returned = self._returns.receive(slot)
        hidden = first.run(step, layout, form, returned, None)
        if returned is not None and self._returns is not None:
            self._returns.release(slot)
        for link, lane in zip(self._links, self._lanes[1:], strict=True):
            link.send(slot, hidden)
            incoming = link.receive(slot)
            hidden = lane.run(step, layout, form, last_ids if lane is self._lanes[-1] else None, incoming)
            link.release(slot)
        last = self._lanes[-1]
        with last.current:
            found = last.likeliest(step, hidden) if step.sampled and draw.plain else None
            if found is not None:
                return self._draws.launch_found(slot, found)
            return self._draws.launch(slot, last.logits(step, hidden) if step.sampled else None, draw)

    def stage_microseconds(self, decodes: int) -> tuple[int, ...]:
        """See `stage_times`."""
        return stage_times(self._lanes, decodes)

    def close(self) -> None:
        """Wait for what was launched."""
        for lane in self._lanes:
            torch.cuda.synchronize(lane.device)

    def _warm(self) -> None:
        for i, lane in enumerate(self._lanes):
            with lane.current:
                lane.warm(partial(_say, i))

    def _rehearse(self, steps: Sequence[tuple[StepRows, Draw]]) -> None:
        """As many steps in flight as there can be."""
        began = time.perf_counter()
        for flight in [self.launch(slot, *step) for step in steps for slot in range(self.depth)]:
            flight.result()
        log.info("rehearsed %d steps in %.2f s", len(steps) * self.depth, time.perf_counter() - began)


class TimesSteps(Protocol):
    """What `measure_chunks` and `stage_times` ask of a lane."""

    @property
    def forms(self) -> tuple[Form, ...]:
        """Of its graphs, the smaller before the larger."""

    @property
    def mixed(self) -> tuple[Form, ...]:
        """Steps with chunks, the smaller before the larger."""

    @property
    def timed_blocks(self) -> int:
        """KV blocks to time the reading of, 0 to this, exclusive; 0: it is not timed."""

    def microseconds(self, form: Form, spans: tuple[RowSpan, ...] = ()) -> int:
        """How long a step of a form takes, over the scratch block but for the decodes of `spans`."""

    def head_microseconds(self, rows: int) -> int:
        """How long the head and a greedy draw take; 0 where there is none."""


def stage_times(lanes: Iterable[TimesSteps], decodes: int) -> tuple[int, ...]:
    """Microseconds that each lane takes by itself for a step of so many decodes, or of the most that there may be, with
    contexts of one token; on the last with the head and a greedy draw."""
    times = []
    for lane in lanes:
        decoding = [form for form in lane.forms if form.sequences is None]
        form = next((form for form in decoding if form.rows >= decodes), decoding[-1])
        times.append(lane.microseconds(form) + lane.head_microseconds(form.rows))
    return tuple(times)


def measure_chunks(
    lane: TimesSteps, *, block_size: int, max_batch_tokens: int, max_sequences: int, max_context: int
) -> Chunks:
    """Time steps of a lane: each that decodes 64, 80, 96, 112, 128, 160... (all have graphs), the first of them with
    long contexts too, then with chunks, up to the first that is too slow beside any of those."""
    counts = counted_decodes(min(max_batch_tokens, max_sequences))
    usual = [(count, lane.microseconds(Form(count))) for count in counts]
    kv_token_ps = measure_kv(lane, *usual[0], block_size=block_size, max_context=max_context)
    chunks = measured_chunks(
        usual,
        ((form.rows, lane.microseconds(form)) for form in lane.mixed),
        kv_token_ps=kv_token_ps,
        most_kv_tokens=lane.timed_blocks * block_size,
        max_batch_tokens=max_batch_tokens,
    )
    said = (f"{count}: {time / 1e3:.1f} ms, {chunks.beside(count, 0)}" for count, time in usual)
    log.info("decodes, what their step takes, and prompt tokens that go beside them: %s", "; ".join(said))
    log.info("a step takes %.1f ns more for each token of the contexts that it decodes", kv_token_ps / 1e3)
    return chunks


def measure_kv(lane: TimesSteps, decodes: int, usual: int, *, block_size: int, max_context: int) -> int:
    """Picoseconds that a step of decodes takes for each token of their contexts; 0 where it can't be timed.

    The contexts are as long as they can be, all blocks divided between them: layers with a window read less of long
    ones for each token, and a time too long would make chunks too large.

    Args:
        decodes: of the step that is timed.
        usual: microseconds that it takes with contexts of one token.
    """
    each = min(lane.timed_blocks // decodes, max_context // block_size)
    if each == 0:
        return 0
    tables = (tuple(range(first, first + each)) for first in range(0, decodes * each, each))
    spans = tuple(RowSpan(each * block_size - 1, 1, table) for table in tables)
    more = lane.microseconds(Form(decodes), spans) - usual
    return max(0, 10**6 * more // (decodes * each * block_size))


def _say(stage: int, done: int, of: int) -> None:
    log.info("stage %d: CUDA graph %d of %d", stage, done + 1, of)
