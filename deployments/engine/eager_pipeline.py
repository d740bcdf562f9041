"""An encoder-decoder's stages on their GPUs: as `cuda_pipeline`, without CUDA graphs.

What its attention gathers has another shape in each step, so no graph can be replayed, and a step is launched operator
by operator. One thread launches all stages, and none of them waits for the host; GPUs are ordered by events alone.
"""

from __future__ import annotations

import itertools
import logging
import time
from dataclasses import replace

import torch
from torch import Tensor

from deployments.engine.attention import RowSpan, positions_of
from deployments.engine.budget import CHUNK_SLOWDOWN, LEAST_CHUNK, Chunks, rows_within
from deployments.engine.cross_batches import CrossStep
from deployments.engine.draw import Draw
from deployments.engine.encoder_decoder import EncoderDecoderStage
from deployments.engine.flight import Draws, Flight
from deployments.engine.link import Link
from deployments.engine.messages import EngineLimits
from deployments.engine.sampler import Sampler
from deployments.engine.stages import StepRows
from deployments.engine.upload import upload
from placement.plan import Plan

log = logging.getLogger(__name__)

_TIMED_RUNS = 3


class EagerPipeline:
    """Launches steps through the stages, each on a GPU of its own.

    Args:
        stages: in layer order.
        sampler: on the last stage's device.
        plan: of the KV blocks and the longest sequence.
        limits: of a step.
    """

    lookahead = 1
    busy_s: tuple[float, ...] = ()
    """Not measured: the host does not wait for stages one by one."""

    def __init__(
        self, stages: tuple[EncoderDecoderStage, ...], sampler: Sampler, plan: Plan, limits: EngineLimits
    ) -> None:
        self.depth = len(stages)
        self._stages = stages
        self._sampler = sampler
        self._plan = plan
        self._links = [
            Link(
                stage.device,
                after.device,
                slots=self.depth,
                shape=(1, limits.max_batch_tokens, stage.hidden_size),
                dtype=stage.hidden_dtype,
            )
            for stage, after in itertools.pairwise(stages)
        ]
        self._reader = next(stage for stage in stages if stage.embeds_outputs)
        """Needs what was drawn before, as the sampler does."""
        self._returns = None
        if self._reader is not stages[-1]:
            devices, shape = (stages[-1].device, self._reader.device), (limits.max_sequences,)
            self._returns = Link(*devices, slots=self.depth, shape=shape, dtype=torch.int64)
        self._draws = Draws(sampler, self._returns, slots=self.depth)
        self.chunks = Chunks.fixed(self._warm(limits))
        """Prompt tokens of a step that keep it within `CHUNK_SLOWDOWN` times one that only decodes."""

    @torch.inference_mode()
    def launch(self, slot: int, step: StepRows, draw: Draw) -> Flight:
        """Queue a step on all GPUs; returns at once."""
        rows, hidden = self._forward(slot, step)
        last = self._stages[-1]
        with torch.cuda.device(last.device):
            self._sampler.note_inputs(rows.ids, rows.slots)
            return self._draws.launch(slot, last.logits(rows, hidden) if step.sampled else None, draw)

    def close(self) -> None:
        """Wait for what was launched."""
        for stage in self._stages:
            torch.cuda.synchronize(stage.device)

    def _forward(self, slot: int, step: StepRows) -> tuple[CrossStep, Tensor]:
        """The step on the last device, and its hidden states [1, T, hidden] there."""
        laid_out = CrossStep.of(step, self._plan.block_size)
        pending = any(token < 0 for token in step.ids)
        hidden: Tensor | None = None
        for index, stage in enumerate(self._stages):
            with torch.cuda.device(stage.device):
                rows = upload(laid_out, stage.device)
                if pending:
                    rows = self._with_drawn(slot, stage, rows)
                incoming = self._links[index - 1].receive(slot)[:, : len(step.ids)] if index else None
                hidden = stage.hidden(rows, incoming)
            if stage is not self._stages[-1]:
                self._links[index].send(slot, hidden)
            if index:  # after it was sent on, since a stage without work hands on what it was given
                self._links[index - 1].release(slot)
        assert hidden is not None
        return rows, hidden

    def _with_drawn(self, slot: int, stage: EncoderDecoderStage, rows: CrossStep) -> CrossStep:
        """`rows` with the ids that the slot's step before has drawn, where a stage needs them."""
        drawn = self._draws.last_ids(slot)
        assert drawn is not None, "the first step of a slot has no step before it"
        returns = self._returns if stage is self._reader else None
        if returns is not None:
            drawn = returns.receive(slot)[: len(drawn)]
        elif stage is not self._stages[-1]:
            return rows
        known = torch.where(rows.ids < 0, drawn[(-1 - rows.ids).clamp_(min=0)], rows.ids)
        if returns is not None:
            returns.release(slot)
        return replace(rows, ids=known)

    @torch.inference_mode()
    def _warm(self, limits: EngineLimits) -> int:
        """Run steps of many sizes over the scratch block, so that kernels are compiled and libraries have their
        workspaces; the tokens of prompts that go beside decodes."""
        sizes = [2**power for power in range(limits.max_batch_tokens.bit_length())]
        decodes = [self._milliseconds(self._decodes(rows)) for rows in sizes if rows <= limits.max_sequences]
        prompts = [size for size in sizes if size > 1]
        if prompts[-1:] != [limits.max_batch_tokens]:
            prompts.append(limits.max_batch_tokens)
        times = [(rows, self._milliseconds(self._prompts(rows))) for rows in prompts]
        usual = decodes[len(decodes) // 2]
        chunk = max(rows_within(times, CHUNK_SLOWDOWN * usual), min(LEAST_CHUNK, limits.max_batch_tokens))
        log.info("a step of decodes takes %.1f ms; beside them go prompts of %d tokens together", usual, chunk)
        return chunk

    def _milliseconds(self, step: StepRows) -> float:
        """How long a step takes from launch to logits."""
        times = []
        for _ in range(_TIMED_RUNS):
            self.close()
            began = time.perf_counter()
            rows, hidden = self._forward(0, step)
            with torch.cuda.device(self._stages[-1].device):
                self._stages[-1].logits(rows, hidden)
            self.close()
            times.append(1e3 * (time.perf_counter() - began))
        return sorted(times)[_TIMED_RUNS // 2]

    def _decodes(self, rows: int) -> StepRows:
        table = (self._plan.num_blocks,) * -(-2 // self._plan.block_size)
        return StepRows((0,) * rows, (1,) * rows, (RowSpan(1, 1, table, 1),) * rows, tuple(range(rows)))

    def _prompts(self, rows: int) -> StepRows:
        """Prompts as long as they may be, of so many tokens together; one token less where that would be the last's."""
        spans = []
        for count in _lengths(rows, self._plan.max_context):
            table = (self._plan.num_blocks,) * -(-count // self._plan.block_size)
            spans.append(RowSpan(0, count, table, count - 1))
        positions = positions_of(spans)
        return StepRows((0,) * len(positions), positions, tuple(spans), (len(positions) - 1,))


def _lengths(tokens: int, longest: int) -> list[int]:
    """Lengths of 2 to `longest` that are `tokens` together, or one less."""
    whole, rest = divmod(tokens, longest)
    return [longest] * whole + [rest] * (rest > 1)
