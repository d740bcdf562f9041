from __future__ import annotations

import pytest

from deployments.routing.fairness import FairShares
from deployments.routing.policy import Size
from deployments.routing.waiting import Waiter, WaitingQueue
from tests.unit.routing.worlds import wish

SMALL = Size(6, 4, 10)


def waiter(key: str, deadline: float = 1e9, size: Size = SMALL, **changes: object) -> Waiter:
    return Waiter(wish(key, **changes), size, 0.0, deadline)


def queue(*deadlines: float) -> WaitingQueue:
    built = WaitingQueue(FairShares({}))
    for index, deadline in enumerate(deadlines):
        built.join(waiter(f"q{index}", deadline, ingress_id="ab"[index % 2]))
    return built


def drained(waiting: WaitingQueue) -> list[str]:
    """Request ids in the order in which they are served when there is room for each."""
    order = []
    while firsts := waiting.firsts():
        key = firsts[0].request.request_id
        order.append(key)
        waiting.leave(key, granted_tokens=firsts[0].size.grant_tokens)
        waiting.check_integrity()
    return order


def test_first_come_first_served() -> None:
    waiting = queue(9, 5, 7)
    assert len(waiting) == 3
    assert waiting.tokens == 30
    assert drained(waiting) == ["q0", "q1", "q2"]
    assert waiting.tokens == len(waiting) == 0


def test_a_flood_of_one_tenant_does_not_hold_up_another() -> None:
    waiting = queue()
    for index in range(100):
        waiting.join(waiter(f"flood{index}", tenant="flood"))
    waiting.join(waiter("a0", tenant="a"))
    waiting.join(waiter("a1", tenant="a"))
    order = drained(waiting)
    assert order[:4] == ["flood0", "a0", "flood1", "a1"]
    assert order[4:] == [f"flood{index}" for index in range(2, 100)]


def test_the_newest_requests_weight_is_its_tenants() -> None:
    """Also where the tenant waits already: its API key's line changed."""
    waiting = WaitingQueue(FairShares({"heavy": 9}))
    for index in range(40):
        waiting.join(waiter(f"heavy{index}", tenant="heavy", weight=2 if index >= 20 else None))
        waiting.join(waiter(f"light{index}", tenant="light"))
        waiting.check_integrity()
    first = drained(waiting)[:30]
    assert sum(key.startswith("heavy") for key in first) == 20


def test_a_weight_does_not_outlive_the_key_that_brought_it() -> None:
    """While the tenant waits on, and after it has left."""
    waiting = WaitingQueue(FairShares({}))
    waiting.join(waiter("always", tenant="other"))
    waiting.join(waiter("keyed", tenant="t", weight=5))
    assert waiting.tokens_before(wish("next", tenant="t", weight=5)) == 12  # 10 before it, and a fifth of that
    waiting.join(waiter("after the key", tenant="t"))
    assert waiting.tokens_before(wish("next", tenant="t")) == 30
    waiting.check_integrity()
    waiting.leave("keyed")
    waiting.join(waiter("keyed again", tenant="t", weight=5))
    waiting.leave("after the key")
    waiting.leave("keyed again")
    for index in range(3):
        waiting.join(waiter(f"t{index}", tenant="t"))
        waiting.join(waiter(f"other{index}", tenant="other"))
    assert sum(key.startswith("t") for key in drained(waiting)[:6]) == 3


def test_tenants_share_by_tokens_and_weight() -> None:
    waiting = WaitingQueue(FairShares({"heavy": 3}))
    for index in range(40):
        waiting.join(waiter(f"heavy{index}", tenant="heavy"))
        waiting.join(waiter(f"light{index}", tenant="light"))
        waiting.join(waiter(f"bulky{index}", tenant="bulky", size=Size(16, 4, 20)))
    first = drained(waiting)[:30]
    assert [sum(key.startswith(name) for key in first) for name in ("heavy", "light", "bulky")] == [19, 7, 4]


def test_being_away_earns_nothing() -> None:
    waiting = queue()
    for index in range(50):
        waiting.join(waiter(f"a{index}", tenant="a"))
    for _ in range(20):
        waiting.leave(waiting.firsts()[0].request.request_id, granted_tokens=10)
    for index in range(10):
        waiting.join(waiter(f"b{index}", tenant="b"))
    assert sum(key.startswith("b") for key in drained(waiting)[:8]) == 4


def test_leaving_unserved_costs_nothing() -> None:
    waiting = queue()
    for index in range(20):
        waiting.join(waiter(f"a{index}", tenant="a"))
        waiting.join(waiter(f"b{index}", tenant="b"))
    for index in range(15):
        waiting.leave(f"a{index}")
    assert drained(waiting)[:4] == ["b0", "a15", "b1", "a16"]


def test_ever_new_tenants_do_not_starve_one_that_was_served_before() -> None:
    waiting = queue()
    for index in range(30):
        waiting.join(waiter(f"old{index}", tenant="old"))
    served = []
    for index in range(90):
        for twin in "xyz":
            waiting.join(waiter(f"{twin}{index}", tenant=f"{twin}{index}"))
        key = waiting.firsts()[0].request.request_id
        served.append(key)
        waiting.leave(key, granted_tokens=10)
    assert sum(key.startswith("old") for key in served) >= 2


def test_priority_orders_a_tenants_own_requests() -> None:
    waiting = queue()
    for key, tenant, priority in [("a late", "a", 5), ("a", "a", 0), ("b", "b", 0), ("a first", "a", -1)]:
        waiting.join(waiter(key, tenant=tenant, priority=priority))
    assert drained(waiting) == ["a first", "b", "a", "a late"]


def test_those_who_are_alike_stand_in_one_line() -> None:
    waiting = queue()
    for key, size in [("10", SMALL), ("12", Size(6, 6, 12)), ("100", Size(60, 40, 100)), ("20", Size(6, 14, 20))]:
        waiting.join(waiter(key, size=size))
    waiting.join(waiter("other pool", pool="int8"))
    waiting.join(waiter("may be long", size=Size(6, 1000, 10)))
    firsts = [w.request.request_id for w in waiting.firsts()]
    assert firsts == ["10", "100", "20", "other pool", "may be long"]
    waiting.leave("10")
    assert waiting.firsts()[0].request.request_id == "12"


def test_tokens_before_follow_the_shares() -> None:
    waiting = WaitingQueue(FairShares({"heavy": 4}))
    for index in range(8):
        waiting.join(waiter(f"a{index}", tenant="a"))
    waiting.join(waiter("b", tenant="b"))
    assert waiting.tokens_before(wish("next", tenant="a")) == 90  # all
    assert waiting.tokens_before(wish("next", tenant="b")) == 20  # its own 10, and as many of a's
    assert waiting.tokens_before(wish("next", tenant="new")) == 0


def test_all_that_resumes_is_served_before_what_does_not() -> None:
    waiting = WaitingQueue(FairShares({}))
    for index in range(3):
        waiting.join(waiter(f"lost{index}", tenant="lost", resumes=True))
        waiting.join(waiter(f"a{index}", tenant="a"))
    waiting.join(waiter("b", tenant="b"))
    assert waiting.tokens_before(wish("next", tenant="new")) == 30
    assert waiting.tokens_before(wish("next", tenant="lost")) == 30
    assert waiting.tokens_before(wish("next", tenant="b")) == 60  # and its own, and as many of each other tenant's
    assert waiting.tokens_before(wish("next", tenant="a")) == 70  # all
    assert waiting.tokens_before(wish("next", tenant="a", resumes=True)) == 30
    waiting.leave("lost0", granted_tokens=10)
    assert waiting.tokens_before(wish("next", tenant="new")) == 20
    waiting.check_integrity()


def test_overdue_ones_come_by_deadline_and_once() -> None:
    waiting = queue(9, 5, 7)
    waiting.leave("q1")
    first = waiting.overdue(8.0)
    assert first is not None
    assert first.request.request_id == "q2"
    waiting.leave("q2")
    assert waiting.overdue(8.0) is None
    assert "q0" in waiting
    waiting.check_integrity()


def test_a_request_waits_once() -> None:
    waiting = queue(9)
    with pytest.raises(ValueError, match="waits already"):
        waiting.join(waiter("q0", 1.0))
    assert waiting.leave("unknown") is None


def test_a_request_that_comes_back_keeps_its_new_deadline_and_place() -> None:
    waiting = queue(1, 20)
    waiting.leave("q0")
    waiting.join(waiter("q0", 9.0))
    assert waiting.overdue(5.0) is None
    assert drained(waiting) == ["q1", "q0"]


def test_of_one_ingress() -> None:
    assert queue(1, 2, 3).of_ingress("a") == ["q0", "q2"]


@pytest.mark.parametrize("others", [0, 3])
def test_memory_does_not_grow_with_those_who_left(others: int) -> None:
    waiting = queue(*[1e9] * others)
    for index in range(5000):
        waiting.join(waiter(f"p{index}", tenant=str(index % 7)))
        if index % 100 == 99:
            waiting.leave(f"p{index}", granted_tokens=10)
        waiting.leave(f"p{index}")
    assert len(waiting._deadlines) < 100
    lines = waiting._lines.values()
    assert sum(len(line._firsts) + sum(map(len, line._of_tenant.values())) for line in lines) < 200
    assert len(waiting._shares._flows) <= 8
    assert len(waiting._shares._ahead) < 200
    waiting.check_integrity()
    assert drained(waiting) == [f"q{index}" for index in range(others)]
