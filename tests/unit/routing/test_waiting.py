from __future__ import annotations

import pytest

from deployments.routing.waiting import Waiter, WaitingQueue
from tests.unit.routing.worlds import wish


def queue(*deadlines: float) -> WaitingQueue:
    built = WaitingQueue()
    for index, deadline in enumerate(deadlines):
        built.join(Waiter(wish(f"q{index}", ingress_id="ab"[index % 2]), deadline, tokens=10))
    return built


def test_first_come_first_served() -> None:
    waiting = queue(9, 5, 7)
    assert len(waiting) == 3
    assert waiting.tokens == 30
    order = []
    while (head := waiting.head()) is not None:
        order.append(head.request.request_id)
        waiting.leave(head.request.request_id)
    assert order == ["q0", "q1", "q2"]
    assert waiting.tokens == 0


def test_overdue_ones_come_by_deadline_and_once() -> None:
    waiting = queue(9, 5, 7)
    waiting.leave("q1")
    first = waiting.overdue(8.0)
    assert first is not None
    assert first.request.request_id == "q2"
    assert waiting.overdue(8.0) is None
    assert "q0" in waiting
    waiting.check_integrity()


def test_a_request_waits_once() -> None:
    waiting = queue(9)
    with pytest.raises(ValueError, match="waits already"):
        waiting.join(Waiter(wish("q0"), 1.0, 1))
    assert waiting.leave("unknown") is None


def test_a_request_that_comes_back_keeps_its_new_deadline() -> None:
    waiting = queue(1)
    waiting.leave("q0")
    waiting.join(Waiter(wish("q0"), 9.0, 1))
    assert waiting.overdue(5.0) is None


def test_of_one_ingress() -> None:
    assert queue(1, 2, 3).of_ingress("a") == ["q0", "q2"]


def test_the_heap_does_not_grow_with_those_who_left() -> None:
    waiting = WaitingQueue()
    for index in range(5000):
        waiting.join(Waiter(wish(f"q{index}"), 1e9, 1))
        waiting.leave(f"q{index}")
    assert len(waiting._deadlines) < 100
    waiting.check_integrity()
