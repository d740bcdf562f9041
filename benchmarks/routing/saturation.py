"""How much a fleet serves at most, whatever the policy: each replica by itself, fed without end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from benchmarks.routing.fleet import ReplicaSpec
from benchmarks.routing.histogram import Histogram
from benchmarks.routing.job import Job
from benchmarks.routing.replica import SimReplica

MOST_JOBS = 1500
BACKLOG = 32


def saturation(fleet: Sequence[ReplicaSpec], jobs: Sequence[Job]) -> float:
    """Requests per second: the sum of what each replica completes alone with a queue that never empties.

    Args:
        fleet: the replicas.
        jobs: what is asked for. When nothing is shared an even sample is taken, otherwise the first ones.
    """
    shared = any(job.granules for job in jobs)
    stride = 1 if shared else max(1, len(jobs) // MOST_JOBS)
    sample = jobs[::stride][:MOST_JOBS]
    rates = {spec: _alone(spec, sample) for spec in set(fleet)}
    return sum(rates[spec] for spec in fleet)


def _alone(spec: ReplicaSpec, jobs: Sequence[Job]) -> float:
    replica = SimReplica(spec, Histogram())
    source = (replace(job) for job in jobs)
    for job, _ in zip(source, range(min(BACKLOG, len(jobs))), strict=False):
        replica.submit(job, 0.0)
    ends: list[float] = []
    while (now := replica.busy_until) is not None:
        for _ in replica.advance(now):
            ends.append(now)
            following = next(source, None)
            if following is not None:
                replica.submit(following, now)
    first, last = len(ends) // 5, 4 * len(ends) // 5
    if ends[last] <= ends[first]:
        raise ValueError(f"{len(jobs)} requests are too few to measure a saturated replica")
    return (last - first) / (ends[last] - ends[first])
