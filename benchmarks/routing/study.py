"""Scenarios, and what all policies make of them over loads and seeds."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

from benchmarks.routing.baselines import BASELINES
from benchmarks.routing.clairvoyant import REFERENCES, ClairvoyantFront
from benchmarks.routing.fleet import FLEETS
from benchmarks.routing.front import Actions, DirectFront, Front, LedgerFront, Limits
from benchmarks.routing.job import Job
from benchmarks.routing.outcome import Interval, Outcome
from benchmarks.routing.replica import SimReplica
from benchmarks.routing.saturation import saturation
from benchmarks.routing.simulation import FrontMaker, Simulation
from benchmarks.routing.workload import Workload, bursty, chats, poisson, trace

OURS = "ledger"
POLICIES = (OURS, *BASELINES)
LEAST_LOAD, MOST_LOAD = 0.3, 1.3
"""Between which the sustained load is sought, as a share of saturation."""
HALVINGS = 6
NOMINAL_RATE = 10.0
"""Requests per second and replica."""

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Setting:
    """What a study holds fixed."""

    fleet: str
    workload: str
    trace: Path | None
    requests: int
    limits: Limits
    ledgers: int = 1

    def jobs(self, rate: float, seed: int) -> list[Job]:
        """The seed's requests; their lengths are the same at every rate, where nothing is shared."""
        return self._source(rate, self.requests, random.Random(seed))

    @property
    def _source(self) -> Workload:
        if self.workload == "trace":
            if self.trace is None:
                raise ValueError("the workload `trace` needs a file: pass --trace FILE")
            return trace(self.trace)
        return {"poisson": poisson, "bursty": bursty, "chats": chats}[self.workload]


def run(setting: Setting, policy: str, load: float, seed: int) -> Outcome:
    """One simulation.

    Args:
        setting: fleet, workload, limits.
        policy: one of POLICIES or REFERENCES.
        load: arrivals per second as a share of what the fleet saturates at with this seed's requests.
        seed: of the arrivals, the lengths and the policy's dice; the same arrivals for all policies.
    """
    fleet = FLEETS[setting.fleet]
    rate = load * _saturation(setting, seed)
    front = front_of(policy, setting.ledgers)
    return Simulation(fleet, setting.jobs(rate, seed), front, setting.limits, seed).run()


def front_of(policy: str, ledgers: int = 1) -> FrontMaker:
    """What makes the front of a policy; `ledgers` of them share the fleet, if it is ours."""

    def front(replicas: Sequence[SimReplica], actions: Actions, limits: Limits, rng: random.Random) -> Front:
        if policy == OURS:
            return LedgerFront(replicas, actions, limits, rng, ledgers)
        if policy in REFERENCES:
            return ClairvoyantFront(REFERENCES[policy], replicas, actions, limits, rng)
        return DirectFront(BASELINES[policy](), replicas, actions, limits, rng)

    return front


@cache
def _saturation(setting: Setting, seed: int) -> float:
    """Of the setting's fleet with this seed's requests; how chats interleave is that of a moderate load."""
    fleet = FLEETS[setting.fleet]
    return saturation(fleet, setting.jobs(NOMINAL_RATE * len(fleet), seed))


def sustained(setting: Setting, policy: str, limit: float, seed: int) -> float:
    """The highest load at which the p99 of the time to the first token is at most `limit` seconds, by bisection."""
    low, high = LEAST_LOAD, MOST_LOAD
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if run(setting, policy, middle, seed).ttft.p99 <= limit:
            low = middle
        else:
            high = middle
    return low


@dataclass(frozen=True)
class Study:
    """All policies in one setting."""

    setting: Setting
    limit: float
    outcomes: dict[tuple[str, float], tuple[Outcome, ...]]
    """(policy, load) -> one outcome per seed."""
    sustained: dict[str, tuple[float, ...]]
    """Policy -> sustained load of each seed, as a share of saturation; empty when it was not sought."""

    @cached_property
    def policies(self) -> list[str]:
        """Those that were run, ours first."""
        return [policy for policy in (*POLICIES, *REFERENCES) if (policy, self.loads[0]) in self.outcomes]

    @cached_property
    def others(self) -> list[str]:
        """Those that ours is compared with; may be none. References are none of them: no router knows what they do."""
        return [policy for policy in self.policies if policy in BASELINES]

    @cached_property
    def loads(self) -> list[float]:
        """In ascending order."""
        return sorted({load for _, load in self.outcomes})

    def p99(self, policy: str, load: float) -> Interval:
        """Of the time to the first token."""
        return Interval.of([outcome.ttft.p99 for outcome in self.outcomes[policy, load]])

    def best_other(self, load: float) -> str:
        """The baseline whose median p99 of the time to the first token is lowest; of equals, the one refusing least."""

        def badness(policy: str) -> tuple[float, int]:
            return self.p99(policy, load).median, sum(outcome.refused for outcome in self.outcomes[policy, load])

        return min(self.others, key=badness)

    def gain(self, load: float) -> Interval:
        """Our p99 over that of the best other policy, seed by seed. Infinite where only ours is infinite."""
        other = self.outcomes[self.best_other(load), load]
        pairs = zip(self.outcomes[OURS, load], other, strict=True)
        return Interval.of([_ratio(ours.ttft.p99, theirs.ttft.p99) for ours, theirs in pairs])

    def sustained_gain(self) -> tuple[str, Interval]:
        """The best other policy, and our sustained load over its, seed by seed."""
        best = max(self.others, key=lambda policy: Interval.of(self.sustained[policy]).median)
        pairs = zip(self.sustained[OURS], self.sustained[best], strict=True)
        return best, Interval.of([ours / theirs for ours, theirs in pairs])


def _ratio(ours: float, theirs: float) -> float:
    if ours == theirs:
        return 1.0
    return ours / theirs


def study(
    setting: Setting,
    *,
    loads: Sequence[float],
    seeds: int,
    limit: float | None,
    others: Sequence[str] = tuple(BASELINES),
    processes: int = 1,
) -> Study:
    """Run everything, ours against `others`; `limit` None leaves out the search for the sustained load."""
    policies = (OURS, *others)
    tasks = [(policy, load, seed) for policy in policies for load in loads for seed in range(seeds)]
    searches = [(policy, seed) for policy in policies for seed in range(seeds)] if limit is not None else []
    outcomes = _map(_run, [(setting, *task) for task in tasks], processes)
    found = _map(_search, [(setting, policy, limit or 0.0, seed) for policy, seed in searches], processes)
    by_task = dict(zip(tasks, outcomes, strict=True))
    by_search = dict(zip(searches, found, strict=True))
    return Study(
        setting,
        limit or 0.0,
        {(p, load): tuple(by_task[p, load, s] for s in range(seeds)) for p in policies for load in loads},
        {p: tuple(by_search[p, s] for s in range(seeds)) for p in policies} if searches else {},
    )


def _map(work: Callable[[T], R], items: Sequence[T], processes: int) -> list[R]:
    if processes == 1:
        return list(map(work, items))
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return list(pool.map(work, items, chunksize=4))


def _run(task: tuple[Setting, str, float, int]) -> Outcome:
    return run(*task)


def _search(task: tuple[Setting, str, float, int]) -> float:
    return sustained(*task)
