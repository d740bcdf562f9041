"""Buckets, and the pace of tokens."""

from __future__ import annotations

from deployments.metrics.histogram import LATENCY_BOUNDS, TOKEN_BOUNDS, Histogram, Pace
from deployments.metrics.pacing import seldom


def test_bounds_are_inclusive_and_the_last_bucket_is_for_the_rest() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 2.5):
        histogram.add(value)
    assert histogram.buckets().counts == (2, 2, 1)
    assert histogram.buckets().total == 7.5


def test_bounds_ascend() -> None:
    for bounds in (LATENCY_BOUNDS, TOKEN_BOUNDS):
        assert list(bounds) == sorted(set(bounds))


def test_tokens_that_come_together_share_the_time() -> None:
    gaps = Histogram((0.5, 1.0, 3.0))
    pace = Pace(gaps)
    pace.arrive(0, 0.0)  # taken up
    pace.arrive(1, 5.0)  # the first token: nothing before it
    pace.arrive(2, 7.0)  # one second each
    pace.arrive(0, 8.0)  # a chunk without tokens
    pace.arrive(1, 9.0)
    assert gaps.buckets().counts == (0, 2, 1, 0)
    assert gaps.buckets().total == 4.0


def test_seldom_reads_at_most_once_in_a_while() -> None:
    now = [0.0]
    read = seldom(lambda: now[0], 1.0, clock=lambda: now[0])
    heard = []
    for now[0] in (0.0, 0.5, 0.99, 1.0, 1.5, 2.1):
        heard.append(read())
    assert heard == [0.0, None, None, 1.0, None, 2.1]
