"""What one run measured, and several seeds together: the median with an interval that assumes nothing."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.report import percentile
from benchmarks.routing.histogram import Histogram
from benchmarks.routing.job import Job


@dataclass(frozen=True, slots=True)
class Times:
    """Mean and percentiles, in seconds."""

    mean: float
    p50: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Times:
        """Of single values; infinite ones count."""
        return cls(statistics.fmean(values), _nearest(values, 50), _nearest(values, 99))


def _nearest(values: Sequence[float], percent: float) -> float:
    """Between an infinite and a finite rank nothing is linear."""
    value = percentile(values, percent)
    return math.inf if math.isnan(value) else value


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run; requests of the warm-up aside."""

    requests: int
    refused: int
    preemptions: int
    """Per run, not per request: one request may be preempted twice."""
    ttft: Times
    gap: Times
    """Between the tokens of one request."""
    end_to_end: Times
    utilisation: float
    """Blocks in use by sequences over all blocks, averaged over the time of arrivals."""
    cached: float
    """Share of the prompt tokens found in prefix caches."""

    @classmethod
    def of(cls, jobs: Sequence[Job], gaps: Histogram, utilisation: float) -> Outcome:
        """Reads the finished jobs."""
        return cls(
            requests=len(jobs),
            refused=sum(job.refused for job in jobs),
            preemptions=sum(job.preemptions for job in jobs),
            ttft=Times.of([job.ttft for job in jobs]),
            gap=Times(gaps.mean, gaps.percentile(50), gaps.percentile(99)),
            end_to_end=Times.of([job.end_to_end for job in jobs]),
            utilisation=utilisation,
            cached=sum(job.cached for job in jobs) / sum(job.prompt for job in jobs),
        )


@dataclass(frozen=True, slots=True)
class Interval:
    """The median over seeds, and two of their order statistics around it.

    With ten seeds the second and the ninth: the true median lies between them with 97.9 % (binomial, no assumption
    about the distribution). With fewer the extremes.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """Of one value per seed."""
        ordered = sorted(values)
        out = 1 if len(ordered) >= 10 else 0
        return cls(statistics.median(ordered), ordered[out], ordered[-1 - out])
