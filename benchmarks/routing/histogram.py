"""Counts of times in bins of equal ratio, for quantities with too many values to keep."""

from __future__ import annotations

import math
from collections import Counter

BINS_PER_E = 50
"""A bin is 2 % wide."""


class Histogram:
    """Positive values by the logarithm of their size; the mean is exact, percentiles to 1 %."""

    def __init__(self) -> None:
        self._bins: Counter[int] = Counter()
        self._sum = 0.0
        self._count = 0

    @property
    def count(self) -> int:
        """Values added."""
        return self._count

    @property
    def mean(self) -> float:
        """NaN for no values."""
        return self._sum / self._count if self._count else math.nan

    def add(self, value: float, times: int) -> None:
        """Add a value, as often as said."""
        self._bins[round(BINS_PER_E * math.log(value))] += times
        self._sum += value * times
        self._count += times

    def percentile(self, percent: float) -> float:
        """Middle of the bin that has the nearest rank; NaN for no values."""
        rank = math.ceil(self._count * percent / 100)
        for bin_, times in sorted(self._bins.items()):
            rank -= times
            if rank <= 0:
                return math.exp(bin_ / BINS_PER_E)
        return math.nan
