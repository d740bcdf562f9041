"""Which rows a graph of the head draws for, with graphs that run what they were made of; real ones are tests/gpu's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import inf, nan

import pytest
import torch
from torch import Tensor

from deployments.engine.greedy import GreedyDraws

SIZES = (1, 2, 4, 8)
HIDDEN, VOCAB = 6, 40


@dataclass
class Replayed:
    """A graph on the CPU: as a capture does, it computes nothing before it is replayed."""

    queue: Callable[[], object]

    def replay(self) -> None:
        self.queue()


@dataclass
class Bench:
    """The draws of a head with random weights, over a buffer of hidden states."""

    weight: Tensor = field(default_factory=lambda: torch.randn(VOCAB, HIDDEN, generator=torch.manual_seed(0)))
    hidden: Tensor = field(default_factory=lambda: torch.zeros(1, 12, HIDDEN))
    asked: list[int] = field(default_factory=list)
    """Rows of each call of the head."""

    def __post_init__(self) -> None:
        self.draws = GreedyDraws(self.head, self.hidden, SIZES, Replayed)
        self._random = torch.Generator().manual_seed(1)

    def head(self, hidden: Tensor) -> Tensor:
        self.asked.append(hidden.shape[1])
        return (hidden @ self.weight.T)[0]

    def fill(self) -> list[int]:
        """Other hidden states; the ids that they lead to."""
        self.hidden.copy_(torch.randn(self.hidden.shape, generator=self._random))
        return (self.hidden @ self.weight.T)[0].argmax(-1).tolist()


@pytest.fixture
def bench() -> Iterator[Bench]:
    with torch.inference_mode():
        yield Bench()


@pytest.mark.parametrize("rows", SIZES)
def test_a_graph_of_each_size_draws_the_largest_logit(bench: Bench, rows: int) -> None:
    expected = bench.fill()
    for count in range(rows // 2 + 1, rows + 1):
        assert bench.draws.draw(rows, count).tolist() == [expected[:count]] * 2
    assert set(bench.asked) == {rows}


def test_later_draws_leave_what_was_drawn(bench: Bench) -> None:
    """Two slots in turn, a step of each in flight: what either drew is read when the other's next step is queued."""
    expected, found = [], []
    for rows, count in ((8, 7), (8, 8), (4, 3), (8, 7), (2, 2)):
        expected.append(bench.fill()[:count])
        found.append(bench.draws.draw(rows, count))
    assert [ids.tolist() for ids, _ in found] == expected


@pytest.mark.parametrize("bad", [nan, inf])
def test_a_bad_row_has_an_id_for_the_device_and_none_for_the_host(bench: Bench, bad: float) -> None:
    expected = bench.fill()
    bench.hidden[0, 1] = bad
    ids, host_ids = bench.draws.draw(4, 3).tolist()
    assert host_ids == [expected[0], -1, expected[2]]
    assert ids[::2] == host_ids[::2]
    assert 0 <= ids[1] < VOCAB


def test_the_largest_is_captured_first() -> None:
    made: list[int] = []

    def captured(queue: Callable[[], object]) -> Replayed:
        queue()
        made.append(bench.asked[-1])
        return Replayed(queue)

    bench = Bench()
    GreedyDraws(bench.head, bench.hidden, SIZES, captured)
    assert made == [8, 4, 2, 1]


def test_only_the_buffer_is_read(bench: Bench) -> None:
    """A step without a graph has hidden states of its own."""
    assert bench.draws.reads(bench.hidden[:, :4])
    assert not bench.draws.reads(bench.hidden.clone())
    assert not bench.draws.reads(bench.hidden[:, 1:])
