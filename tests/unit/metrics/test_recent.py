"""How fast a counter grows, as far as it was told."""

from __future__ import annotations

import pytest

from deployments.metrics.recent import WINDOW_S, RecentRate


def told(*samples: tuple[float, int]) -> RecentRate:
    rate = RecentRate()
    for now, count in samples:
        rate.add(count, now)
    return rate


def test_it_needs_two_tellings() -> None:
    assert told().per_s(0.0) is None
    assert told((0.0, 7)).per_s(0.0) is None
    assert told((0.0, 7), (0.0, 9)).per_s(0.0) is None
    assert told((0.0, 7), (2.0, 9)).per_s(2.0) == 1.0


def test_only_the_last_seconds_count() -> None:
    steady = told(*((float(second), 100 * second) for second in range(60)))
    assert steady.per_s(59.0) == 100.0
    stopped = told(*((float(second), min(second, 20) * 100) for second in range(60)))
    assert stopped.per_s(59.0) == 0.0
    assert len(stopped._told) <= WINDOW_S + 2


def test_slow_tellings_are_not_forgotten() -> None:
    assert told((0.0, 0), (20.0, 100), (40.0, 300)).per_s(40.0) == 10.0


@pytest.mark.parametrize("restart", [(3.0, 5), (-1.0, 300)])
def test_another_counter_or_clock_starts_anew(restart: tuple[float, int]) -> None:
    rate = told((0.0, 0), (2.0, 200), restart)
    assert rate.per_s(restart[0]) is None
    rate.add(restart[1] + 50, restart[0] + 1.0)
    assert rate.per_s(restart[0] + 1.0) == 50.0


def test_silence_is_not_a_rate() -> None:
    rate = told((0.0, 0), (1.0, 100))
    assert rate.per_s(1.0 + WINDOW_S) == 100.0
    assert rate.per_s(1.1 + WINDOW_S) is None
