"""The policies that the ledger is compared with. Each sends a request at once; it then waits in the replica's queue.

All see only replicas that the request would fit if they were empty. Counts of requests sent and not ended are the
router's own, exact, as with one router process; KV usage is as old as reports are.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.routing.fleet import ReplicaSpec
from benchmarks.routing.job import GRANULE, Job


@dataclass(slots=True)
class Known:
    """What a router knows of one replica."""

    index: int
    spec: ReplicaSpec
    ongoing: int = 0
    """Requests sent there and not ended."""
    kv_usage: float = 0.0
    """Share of the blocks in use, from its last report."""
    granules: set[int] = field(default_factory=set)
    """Granules of prompts sent there; the affinity policy's own note."""


Policy = Callable[[Job, Sequence[Known], random.Random], Known]
"""Picks one of the replicas that the job fits; never called with none."""


def round_robin() -> Policy:
    """Each in turn."""
    turn = -1

    def pick(_: Job, fleet: Sequence[Known], __: random.Random) -> Known:
        nonlocal turn
        later = [known for known in fleet if known.index > turn]
        chosen = (later or fleet)[0]
        turn = chosen.index
        return chosen

    return pick


def at_random() -> Policy:
    """Any, with equal odds."""
    return lambda _, fleet, rng: rng.choice(fleet)


def least_requests() -> Policy:
    """The fewest ongoing requests; ties at random."""
    return lambda _, fleet, rng: _least(fleet, rng, lambda known: known.ongoing)


def two_choices() -> Policy:
    """Of two replicas drawn at random, the one with fewer ongoing requests: Ray Serve's default."""

    def pick(_: Job, fleet: Sequence[Known], rng: random.Random) -> Known:
        return min(rng.sample(fleet, min(2, len(fleet))), key=lambda known: known.ongoing)

    return pick


def most_free_kv() -> Policy:
    """The highest `1 - kv_usage` in the last reports; ties at random."""
    return lambda _, fleet, rng: _least(fleet, rng, lambda known: known.kv_usage)


def prefix_affinity(imbalance: int = 8) -> Policy:
    """The replica that was sent most of the prompt's leading granules, unless it has `imbalance` requests more than the
    least loaded; then, or when nothing matches, the least loaded one.
    """

    def pick(job: Job, fleet: Sequence[Known], rng: random.Random) -> Known:
        least = _least(fleet, rng, lambda known: known.ongoing)
        wanted = job.granules[: job.prompt // GRANULE]
        best = _least(fleet, rng, lambda known: (-_matching(wanted, known.granules), known.ongoing))
        matched = _matching(wanted, best.granules) > 0
        chosen = best if matched and best.ongoing - least.ongoing <= imbalance else least
        chosen.granules.update(job.granules)
        return chosen

    return pick


BASELINES: dict[str, Callable[[], Policy]] = {
    "round robin": round_robin,
    "random": at_random,
    "least requests": least_requests,
    "two choices": two_choices,
    "most free KV": most_free_kv,
    "prefix affinity": prefix_affinity,
}


def _matching(wanted: Sequence[int], there: set[int]) -> int:
    for number, granule in enumerate(wanted):
        if granule not in there:
            return number
    return len(wanted)


def _least(fleet: Sequence[Known], rng: random.Random, key: Callable[[Known], object]) -> Known:
    keys = [key(known) for known in fleet]
    least = min(keys)  # type: ignore[type-var]  # keys that can be compared
    return rng.choice([known for known, value in zip(fleet, keys, strict=True) if value == least])
