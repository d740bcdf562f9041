"""The lanes of the CPU: order, overlap, ids that the host has not read, and failures. The stages here only count."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from deployments.engine.attention import RowSpan
from deployments.engine.draw import Draw
from deployments.engine.pipeline import LanePipeline
from deployments.engine.sampler import Sampler
from deployments.engine.sampling_batch import Row
from deployments.engine.stages import StepRows
from deployments.protocol import Sampling

VOCAB = 64
BLOCK = 4


class Counting:
    """A stage of a model whose next token is the last one plus 1; `before` runs in its lane at each step."""

    device = torch.device("cpu")

    def __init__(self, *, last: bool, before: Callable[[StepRows], None] = lambda _: None) -> None:
        self.seen: list[tuple[int, ...]] = []
        self.threads = 0
        self._last = last
        self._before = before

    def run(self, rows: StepRows, incoming: Tensor | None, block_size: int) -> Tensor:
        assert block_size == BLOCK
        self._before(rows)
        self.seen.append(rows.ids)
        self.threads = torch.get_num_threads()
        hidden = torch.tensor(rows.ids)[None, :, None] if incoming is None else incoming
        return one_hot(hidden[0, rows.sampled, 0] + 1, VOCAB).float() if self._last else hidden


def opened(stages: list[Counting], **options: int) -> LanePipeline:
    sampler = Sampler(torch.device("cpu"), vocab_size=VOCAB, num_blocks=8, block_size=BLOCK)
    return LanePipeline(tuple(stages), BLOCK, sampler, **({"threads": 1, "lookahead": 1} | options))  # type: ignore[arg-type]  # options by name


@pytest.fixture
def open_pipeline() -> Iterator[Callable[..., LanePipeline]]:
    """Opens pipelines that the test's end closes."""
    pipelines = []

    def open_one(*stages: Counting, **options: int) -> LanePipeline:
        pipelines.append(opened(list(stages), **options))
        return pipelines[-1]

    yield open_one
    for pipeline in pipelines:
        pipeline.close()


def step(*ids: int, start: int = 0, sampled: tuple[int, ...] | None = None, **sampling: Any) -> tuple[StepRows, Draw]:
    """One sequence's tokens each, at one position, sequence i in block i; greedy."""
    spans = tuple(RowSpan(start, 1, (block,)) for block in range(len(ids)))
    chosen = tuple(range(len(ids))) if sampled is None else sampled
    row = Row(Sampling(max_tokens=9, seed=1, temperature=0.0, **sampling), 1, VOCAB)
    draw = Draw(
        (row,) * len(chosen),
        positions=(start + 1,) * len(chosen),
        tables=tuple((block,) for block in chosen),
    )
    return StepRows(ids, (start,) * len(ids), spans, chosen), draw


def tokens(landing: Any) -> list[int]:
    return [token.token_id for token in landing.result()]


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_a_step_feeds_what_its_slot_s_step_before_drew(stages: int, open_pipeline: Callable[..., LanePipeline]) -> None:
    lanes = [Counting(last=i == stages - 1) for i in range(stages)]
    pipeline = open_pipeline(*lanes)
    assert (pipeline.depth, pipeline.lookahead) == (stages, 1)
    first = pipeline.launch(0, *step(10, 20, 30, sampled=(0, 2)))
    other = pipeline.launch(stages - 1, *step(40)) if stages > 1 else None
    second = pipeline.launch(0, *step(-2, -1, 50, start=1))
    third = pipeline.launch(0, *step(-3, start=2))
    assert [tokens(landing) for landing in (first, second, third)] == [[11, 31], [32, 12, 51], [52]]
    assert other is None or tokens(other) == [41]
    assert all(lane.seen[-2:] == [(31, 11, 50), (51,)] for lane in lanes), "every stage knows the ids"


def test_launch_does_not_wait(open_pipeline: Callable[..., LanePipeline]) -> None:
    go = threading.Event()
    pipeline = open_pipeline(Counting(last=True, before=lambda _: _wait(go)))
    landings = [pipeline.launch(0, *step(1)), pipeline.launch(0, *step(-1, start=1))]
    assert not any(landing.done() for landing in landings)
    go.set()
    assert [tokens(landing) for landing in landings] == [[2], [3]]


def test_stages_work_on_different_steps_at_once(open_pipeline: Callable[..., LanePipeline]) -> None:
    both = threading.Barrier(2, timeout=20)

    def meet(stage: int) -> Callable[[StepRows], None]:
        """The first stage's second step meets the last stage's first one: neither goes on alone."""
        return lambda rows: None if rows.ids[0] != (2, 1)[stage] else _pass_barrier(both)

    pipeline = open_pipeline(Counting(last=False, before=meet(0)), Counting(last=True, before=meet(1)))
    landings = [pipeline.launch(slot, *step(1 + slot)) for slot in (0, 1)]
    assert [tokens(landing) for landing in landings] == [[2], [3]]


def test_steps_pass_every_stage_in_launch_order(open_pipeline: Callable[..., LanePipeline]) -> None:
    lanes = [Counting(last=False), Counting(last=True)]
    pipeline = open_pipeline(*lanes)
    for i in range(20):
        landing = pipeline.launch(i % 2, *step(i))
    landing.result()
    assert [lane.seen for lane in lanes] == [[(i,) for i in range(20)]] * 2


@pytest.mark.parametrize("broken", [0, 1])
def test_a_failure_is_raised_by_its_step_and_by_those_that_continue_it(
    broken: int, open_pipeline: Callable[..., LanePipeline]
) -> None:
    def fail(rows: StepRows) -> None:
        if rows.ids[0] == 1:
            raise RuntimeError("the device is gone")

    pipeline = open_pipeline(*(Counting(last=i == 1, before=fail if i == broken else lambda _: None) for i in (0, 1)))
    failed, continued, other = (
        pipeline.launch(0, *step(1)),
        pipeline.launch(0, *step(-1, start=1)),
        pipeline.launch(1, *step(5)),
    )
    for landing in (failed, continued):
        with pytest.raises(RuntimeError, match="the device is gone"):
            landing.result()
    assert tokens(other) == [6]


def test_a_step_that_samples_nothing_lands_with_nothing(open_pipeline: Callable[..., LanePipeline]) -> None:
    pipeline = open_pipeline(Counting(last=True))
    assert pipeline.launch(0, *step(3, 4, sampled=())).result() == []


def test_penalties_see_ids_that_the_host_has_not_read(open_pipeline: Callable[..., LanePipeline]) -> None:
    """Of the output before each draw: 6, then 6 and 7, then 6, 7 and 6."""
    pipeline = open_pipeline(Counting(last=True))
    penalty = {"frequency_penalty": 2.0, "logit_bias": ((7, 0.5),)}
    first = pipeline.launch(0, *step(6, start=1, **penalty))
    second = pipeline.launch(0, *step(-1, start=2, **penalty))
    third = pipeline.launch(0, *step(6, start=3, **penalty))
    assert tokens(first) == [7], "6 + 1"
    assert tokens(second) == [8], "7 + 1 at 1.0, before 7 at 0.5 - 2"
    assert tokens(third) == [0], "7 at 1.5 - 2, all others at 0"


def test_each_lane_has_its_torch_threads(open_pipeline: Callable[..., LanePipeline]) -> None:
    stage = Counting(last=True)
    open_pipeline(stage, threads=2).launch(0, *step(1)).result()
    assert stage.threads == 2


def test_close_finishes_what_is_in_flight() -> None:
    stage = Counting(last=True)
    pipeline = opened([stage])
    landing = pipeline.launch(0, *step(1))
    pipeline.close()
    assert tokens(landing) == [2]
    with pytest.raises(RuntimeError, match="shutdown"):
        pipeline.launch(0, *step(1))


def _wait(event: threading.Event) -> None:
    assert event.wait(20)


def _pass_barrier(barrier: threading.Barrier) -> None:
    barrier.wait()
