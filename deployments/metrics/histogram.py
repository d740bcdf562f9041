"""Counts of durations by bucket: a list of integers, so that taking one in costs less than a microsecond."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

LATENCY_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
"""Seconds: first token, queue."""
TOKEN_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Seconds: steps, and from token to token."""


@dataclass(frozen=True, slots=True)
class Buckets:
    """A histogram at one instant."""

    bounds: tuple[float, ...]
    """Upper bounds, inclusive, ascending."""
    counts: tuple[int, ...]
    """One per bound, and a last one for what is above all; not cumulative."""
    total: float
    """Sum of all values."""


class Histogram:
    """Counts values by bucket; for one thread.

    Args:
        bounds: upper bounds, inclusive, ascending.
    """

    __slots__ = ("_bounds", "_counts", "_total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def add(self, value: float, times: int = 1) -> None:
        """Count `value`, `times` over."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._total += value * times

    def buckets(self) -> Buckets:
        """What was counted so far."""
        return Buckets(self._bounds, tuple(self._counts), self._total)


class Pace:
    """Times one choice's tokens: the time between two arrivals, shared out among the tokens that came with the later.

    Args:
        gaps: takes the times between tokens.
    """

    __slots__ = ("_gaps", "_last")

    def __init__(self, gaps: Histogram) -> None:
        self._gaps = gaps
        self._last: float | None = None

    def arrive(self, tokens: int, now: float) -> None:
        """`tokens` came at once; those of the first arrival have nothing before them."""
        if tokens and self._last is not None:
            self._gaps.add((now - self._last) / tokens, tokens)
        if tokens:
            self._last = now
