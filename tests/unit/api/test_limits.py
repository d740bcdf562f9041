"""Limits of keys: what is let through, when, and how replicas share them."""

from __future__ import annotations

import pytest

from deployments.api.keys import ApiKey
from deployments.api.limits import MINUTE_NS, Limiter
from deployments.errors import KeyLimitExceeded

SECOND = 10**9


def key(**limits: int) -> ApiKey:
    return ApiKey(name="a", sha256="0" * 64, **limits)


class Bench:
    def __init__(self, replicas: int = 1) -> None:
        self.now = 5 * MINUTE_NS
        self.limiter = Limiter(replicas, lambda: self.now)

    def wait(self, asking: ApiKey) -> int | None:
        """Seconds that a request is told to wait; it ends at once otherwise, having used nothing."""
        try:
            self.limiter.enter(asking).leave(0)
        except KeyLimitExceeded as refused:
            return refused.retry_after_s
        return None


def test_a_key_without_limits() -> None:
    bench = Bench()
    assert [bench.wait(key()) for _ in range(1000)] == [None] * 1000


def test_a_minutes_worth_at_once_then_evenly() -> None:
    bench, four = Bench(), key(requests_per_minute=4)
    assert [bench.wait(four) for _ in range(6)] == [None] * 4 + [15, 15]
    bench.now += 14 * SECOND
    assert bench.wait(four) == 1
    bench.now += SECOND
    assert [bench.wait(four) for _ in range(2)] == [None, 15]
    bench.now += 3600 * SECOND
    assert [bench.wait(four) for _ in range(5)] == [None] * 4 + [15]


def test_retry_after_is_never_too_early() -> None:
    bench, seven = Bench(), key(requests_per_minute=7)
    for _ in range(50):
        wait = bench.wait(seven)
        if wait is not None:
            bench.now += wait * SECOND
            assert bench.wait(seven) is None


def test_output_is_a_debt_that_later_requests_wait_for() -> None:
    bench, sixty = Bench(), key(tokens_per_minute=60)
    first, second = bench.limiter.enter(sixty), bench.limiter.enter(sixty)
    first.pay(20)
    assert bench.wait(sixty) is None
    first.leave(70)
    assert bench.wait(sixty) == 11
    second.pay(30)
    assert bench.wait(sixty) == 41
    second.leave(0)  # no replica took it up
    assert bench.wait(sixty) == 11
    bench.now += 11 * SECOND
    assert bench.wait(sixty) is None


def test_at_once() -> None:
    bench, two = Bench(), key(concurrent_requests=2)
    running = [bench.limiter.enter(two) for _ in range(2)]
    assert bench.wait(two) == 1
    running.pop().leave(5)
    assert bench.wait(two) is None
    assert bench.wait(key(concurrent_requests=1)) == 1  # a lowered limit counts those that run


def test_keys_do_not_share() -> None:
    bench = Bench()
    other = ApiKey(name="b", sha256="1" * 64, requests_per_minute=1)
    assert [bench.wait(key(requests_per_minute=1)) for _ in range(2)] == [None, 60]
    assert bench.wait(other) is None


def test_a_changed_limit_starts_anew() -> None:
    bench = Bench()
    assert [bench.wait(key(requests_per_minute=1)) for _ in range(2)] == [None, 60]
    assert bench.wait(key(requests_per_minute=2)) is None
    assert bench.wait(key()) is None


@pytest.mark.parametrize(("replicas", "limit", "each"), [(1, 5, 5), (2, 5, 3), (5, 5, 1), (9, 5, 1)])
def test_replicas_divide_a_limit(replicas: int, limit: int, each: int) -> None:
    bench = Bench(replicas)
    assert [bench.wait(key(requests_per_minute=limit)) for _ in range(each + 1)].count(None) == each
    asking = key(concurrent_requests=limit)
    for _ in range(each):
        bench.limiter.enter(asking)
    assert bench.wait(asking) == 1
