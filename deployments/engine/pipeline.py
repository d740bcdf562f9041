"""The stages in a row: a step is launched into the first and read after the last, with one step per slot in flight.

On CPU each stage has a thread, as each GPU has a stream: a stage works on its steps in launch order and waits for the
stage before by a future, as a stream waits by an event. One stage alone needs no thread: it runs at launch.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from deployments.engine.stages import Stage, StepRows, run_stages

T = TypeVar("T")


class Pipeline:
    """Launches steps through the stages.

    Args:
        stages: in layer order.
        block_size: tokens per KV block.
        threads: torch threads of each stage on the CPU.
    """

    def __init__(self, stages: tuple[Stage, ...], block_size: int, *, threads: int) -> None:
        self._stages = stages
        self._block_size = block_size
        on_cpu = stages[0].device.type == "cpu"
        self._lanes = (
            [ThreadPoolExecutor(1, f"stage-{i}", torch.set_num_threads, (threads,)) for i in range(len(stages))]
            if on_cpu and len(stages) > 1
            else []
        )
        if on_cpu and not self._lanes:
            torch.set_num_threads(threads)

    @property
    def depth(self) -> int:
        """Steps that can be in flight at once."""
        return len(self._stages)

    def launch(self, step: StepRows, finish: Callable[[Tensor], T]) -> Future[T]:
        """Send a step through all stages; `finish` turns its logits [sampled rows, vocab] into the result."""
        if not self._lanes:
            return _completed(lambda: finish(run_stages(self._stages, step, self._block_size)))
        before: Future[Tensor] | None = None
        for stage, lane in zip(self._stages, self._lanes, strict=True):
            before = lane.submit(self._run_after, stage, step, before)
        last = before
        assert last is not None
        return self._lanes[-1].submit(lambda: finish(last.result()))

    def close(self) -> None:
        """Let the stages' threads end; steps in flight are finished first."""
        for lane in self._lanes:
            lane.shutdown()

    def _run_after(self, stage: Stage, step: StepRows, before: Future[Tensor] | None) -> Tensor:
        return stage.run(step, None if before is None else before.result(), self._block_size)


def _completed(work: Callable[[], T]) -> Future[T]:
    future: Future[T] = Future()
    try:
        future.set_result(work())
    except Exception as error:  # noqa: BLE001 - handed on by Future.result(), like an executor does
        future.set_exception(error)
    return future
