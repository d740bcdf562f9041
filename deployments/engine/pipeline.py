"""The stages in a row: a step is launched into the first and read after the last, in the order of launch.

On the CPU each stage has a lane, a thread that works on its steps in launch order, as a GPU has a stream. A step waits
for the stage before, and for the ids that the step before it drew, by a future, as a stream waits by an event. What it
waits for was launched earlier, so the oldest step can always go on. One stage alone, with no step launched ahead, needs
no thread: it works at launch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from deployments.engine.budget import Chunks
from deployments.engine.cuda_pipeline import CudaPipeline
from deployments.engine.draw import Draw
from deployments.engine.eager_pipeline import EagerPipeline
from deployments.engine.loader import LoadedModel
from deployments.engine.messages import EngineLimits
from deployments.engine.sampler import Sampler
from deployments.engine.sampling import SampledToken
from deployments.engine.stages import RunsSteps, StepRows
from placement.plan import Plan

T = TypeVar("T")

CPU_LOOKAHEAD: Literal[0, 1] = 0
"""SmolLM2 135M in NF4, 1 and 8 sequences, one and two stages: with lookahead a token takes 0.99 to 1.02 times as long,
since what the host does is a hundredth of a step. Without it a request's first chunk waits for one step less."""
CPU_CHUNK_TOKENS = 32
"""SmolLM2 135M in NF4 on one core: 54 ms for a step that decodes one sequence, 84 ms for 8, and 3 ms for each prompt
token beside them. With 32 a step takes 2.2 times as long as with 8 decodes alone, with 64 3.2 times."""


class Landing(Protocol):
    """A launched step."""

    def result(self) -> list[SampledToken]:
        """What it drew, one per sampled row. Waits for it; raises what a stage raised."""
        ...


class Pipeline(Protocol):
    """What runs the steps."""

    @property
    def depth(self) -> int:
        """Slots: steps that keep all stages busy."""
        ...

    @property
    def lookahead(self) -> int:
        """Steps of a slot, 0 or 1, that may be launched while the one before is unread."""
        ...

    @property
    def chunks(self) -> Chunks:
        """Prompt tokens in a step that others decode in, where nobody has set it."""
        ...

    @property
    def busy_s(self) -> tuple[float, ...]:
        """Seconds that each stage has computed since the start; empty where it is not measured."""
        ...

    def launch(self, slot: int, rows: StepRows, draw: Draw) -> Landing:
        """Send a step through all stages, behind all steps launched before it.

        `rows.ids` may hold -1 - i for the id that sampled row i of the slot's step before this one drew.
        """
        ...

    def close(self) -> None:
        """Let go of threads and devices; steps in flight are finished first."""
        ...


def open_pipeline(model: LoadedModel, plan: Plan, limits: EngineLimits) -> Pipeline:
    """The pipeline of the model's devices.

    Raises:
        ValueError: no lookahead is asked for on CUDA.
    """
    if limits.lookahead == 0 and model.stages[0].device.type == "cuda":
        raise ValueError("lookahead is 0, but steps on CUDA are always launched one ahead; leave it at None")
    sampler = Sampler(
        model.stages[-1].device,
        vocab_size=model.vocab_size,
        num_blocks=plan.num_blocks,
        block_size=plan.block_size,
    )
    if model.stages[0].device.type == "cuda" and model.encodes:
        return EagerPipeline(model.with_encoder(), sampler, plan, limits)
    if model.stages[0].device.type == "cuda":
        return CudaPipeline(
            model.decoder_only(),
            sampler,
            block_size=plan.block_size,
            max_batch_tokens=limits.max_batch_tokens,
            max_sequences=limits.max_sequences,
            max_context=plan.max_context,
        )
    lookahead = CPU_LOOKAHEAD if limits.lookahead is None else limits.lookahead
    return LanePipeline(model.stages, plan.block_size, sampler, threads=limits.threads, lookahead=lookahead)


@dataclass(frozen=True, slots=True)
class _Passing:
    """A step between two stages."""

    rows: StepRows
    """All ids known."""
    hidden: Tensor


class _AtLaunch(Executor):
    """Works in the thread that submits: two hand-overs between threads cost a step of a small model a twentieth."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        future: Future[T] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 - handed on by Future.result(), like any executor does
            future.set_exception(error)
        return future


class LanePipeline:
    """The stages on the CPU, a lane each.

    Args:
        stages: in layer order.
        block_size: tokens per KV block.
        sampler: of the last stage's device.
        threads: torch threads of each stage.
        lookahead: see `Pipeline`.
    """

    chunks = Chunks.fixed(CPU_CHUNK_TOKENS)

    def __init__(
        self, stages: Sequence[RunsSteps], block_size: int, sampler: Sampler, *, threads: int, lookahead: int
    ) -> None:
        self.depth = len(stages)
        self.lookahead = lookahead
        self._stages = stages
        self._block_size = block_size
        self._sampler = sampler
        self._drawn: dict[int, Future[list[SampledToken]]] = {}
        """By slot: what its latest step draws."""
        self._busy_s = [0.0] * len(stages)
        """Each written by its stage's thread alone."""
        self._lanes: list[Executor]
        if len(stages) == 1 and lookahead == 0:
            torch.set_num_threads(threads)
            self._lanes = [_AtLaunch()]
        else:
            self._lanes = [
                ThreadPoolExecutor(1, f"stage-{i}", torch.set_num_threads, (threads,)) for i in range(len(stages))
            ]

    def launch(self, slot: int, rows: StepRows, draw: Draw) -> Future[list[SampledToken]]:
        """See `Pipeline`."""
        passing = self._lanes[0].submit(self._enter, rows, self._drawn.get(slot))
        for index, lane in enumerate(self._lanes[1:], start=1):
            passing = lane.submit(self._pass, index, passing)
        self._drawn[slot] = self._lanes[-1].submit(self._leave, passing, draw)
        return self._drawn[slot]

    @property
    def busy_s(self) -> tuple[float, ...]:
        """See `Pipeline`."""
        return tuple(self._busy_s)

    def close(self) -> None:
        """Let the lanes end; steps in flight are finished first."""
        for lane in self._lanes:
            lane.shutdown()

    def _enter(self, rows: StepRows, before: Future[list[SampledToken]] | None) -> _Passing:
        if any(token < 0 for token in rows.ids):
            assert before is not None, "the first step of a slot has no step before it"
            drawn = before.result()
            rows = replace(rows, ids=tuple(t if t >= 0 else drawn[-1 - t].token_id for t in rows.ids))
        with self._busy(0):
            return _Passing(rows, self._stages[0].run(rows, None, self._block_size))

    def _pass(self, index: int, before: Future[_Passing]) -> _Passing:
        passing = before.result()
        with self._busy(index):
            return _Passing(passing.rows, self._stages[index].run(passing.rows, passing.hidden, self._block_size))

    @torch.inference_mode()
    def _leave(self, last: Future[_Passing], draw: Draw) -> list[SampledToken]:
        passing = last.result()
        with self._busy(-1):
            self._sampler.note_inputs(*_inputs(passing.rows, self._block_size, passing.hidden.device))
            return self._sampler.draw(passing.hidden, draw).read()

    @contextmanager
    def _busy(self, stage: int) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._busy_s[stage] += time.perf_counter() - began


def _inputs(rows: StepRows, block_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(ids, cache slots) of a step, each int64 [T]."""
    return torch.tensor(rows.ids, device=device), torch.tensor(rows.cache_slots(block_size), device=device)
