from __future__ import annotations

from deployments.engine.queues import Queues
from deployments.engine.sequence import TokenSequence


def sequence(arrival: int) -> TokenSequence:
    return TokenSequence(f"{arrival}", (1,), "", 1, arrival)


def names(queue: list[TokenSequence]) -> list[int]:
    return [each.arrival for each in queue]


def test_one_that_was_set_back_waits_where_its_arrival_says() -> None:
    queues = Queues(2)
    for arrival in range(4):
        queues.wait(sequence(arrival))
    for slot in (0, 1, 0):
        queues.enter(slot)
    assert [names(queue) for queue in (queues.waiting, *queues.slots)] == [[3], [0, 2], [1]]
    assert queues.youngest().arrival == 2
    back = queues.slots[1][0]
    queues.leave(back)
    back.set_back()
    queues.wait(back)
    assert names(queues.waiting) == [1, 3]
    assert all(queues.checks().values())


def test_those_that_leave_are_in_no_queue() -> None:
    queues = Queues(1)
    runs, waits = sequence(0), sequence(1)
    for each in (runs, waits):
        queues.wait(each)
    queues.enter(0)
    for each in (runs, waits):
        queues.leave(each)
    assert not queues.waiting
    assert not list(queues.running())
    assert runs.slot is None
