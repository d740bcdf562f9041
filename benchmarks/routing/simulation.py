"""The event loop: arrivals, steps, reports, ticks. Simulated time, one heap, no wall clock."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count

from benchmarks.routing.fleet import ReplicaSpec
from benchmarks.routing.front import Actions, Front, Limits
from benchmarks.routing.histogram import Histogram
from benchmarks.routing.job import Job
from benchmarks.routing.outcome import Outcome
from benchmarks.routing.replica import SimReplica

WARM_UP = 0.2
"""Leading share of the requests that no figure counts: the fleet fills, and the ledger learns output lengths."""
TICK = 0.05
"""Seconds between two ticks of the ledger's shell."""
LONGEST = 3600.0
"""Simulated seconds after the last arrival in which all must have ended."""

FrontMaker = Callable[[Sequence[SimReplica], Actions, Limits, random.Random], Front]


class Simulation:
    """One run of one policy on one fleet."""

    def __init__(
        self, fleet: Sequence[ReplicaSpec], jobs: Sequence[Job], front: FrontMaker, limits: Limits, seed: int
    ) -> None:
        self.now = 0.0
        self.limits = limits
        self.jobs = jobs
        self.gaps = Histogram()
        self.replicas = [SimReplica(spec, self.gaps) for spec in fleet]
        self.front = front(self.replicas, self, limits, random.Random(seed))
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()
        self._open = len(jobs)
        self._reported_at = [0.0] * len(fleet)
        self._report_due: list[float | None] = [None] * len(fleet)

    def run(self) -> Outcome:
        """Until every request has ended or was refused."""
        if not self.jobs:
            raise ValueError("a simulation needs at least one request")
        for job in self.jobs:
            self._at(job.arrival + self.front.call, partial(self._arrive, job))
        first = self.jobs[int(WARM_UP * len(self.jobs))].arrival
        last = self.jobs[-1].arrival
        areas: list[float] = []
        for time in (first, last):
            self._at(time, lambda: areas.append(self._used_area()))
        for replica in range(len(self.replicas)):
            self._due(replica, self.limits.heartbeat * random.Random(replica).random())
        self._tick()
        while self._open or len(areas) < 2:
            self.now, _, act = heapq.heappop(self._events)
            act()
            if self.now > last + LONGEST:
                raise RuntimeError(f"{self._open} requests neither ended nor were refused in {LONGEST:g} s")
        capacity = sum(replica.spec.capacity_blocks for replica in self.replicas)
        used = (areas[1] - areas[0]) / ((last - first) * capacity) if last > first else 0.0
        return Outcome.of(self.jobs[int(WARM_UP * len(self.jobs)) :], self.gaps, used)

    def _arrive(self, job: Job) -> None:
        self.front.arrive(job, self.now)

    def send(self, job: Job, replica: int) -> None:
        """A front hands a job to a replica."""
        it = self.replicas[replica]
        before = it.busy_until
        it.submit(job, self.now)
        self._changed(replica)
        if it.busy_until != before:
            self._step(replica)
        self._at(job.arrival + self.limits.wait_limit, lambda: self._overdue(job))

    def refuse(self, job: Job) -> None:
        """A front ends a job unserved."""
        job.refused = True
        self._open -= 1

    def _overdue(self, job: Job) -> None:
        if job.first_token_at > self.now and not job.refused:
            self.front.overdue(job, self.now)

    def _step(self, replica: int) -> None:
        """Wake up when the steps under way end; a wake-up that was overtaken by a cut does nothing."""
        it = self.replicas[replica]
        due = it.busy_until
        if due is None:
            return

        def advance() -> None:
            if it.busy_until != due:
                return
            ended = it.advance(self.now)
            for job in ended:
                self.front.ended(job, replica)
            self._open -= len(ended)
            if ended:
                self._changed(replica, ended=True)
            self._step(replica)

        self._at(due, advance)

    def _changed(self, replica: int, *, ended: bool = False) -> None:
        """It has something to report, at once or as soon as it may."""
        every = self.front.end_within(replica) if ended else self.limits.report_every
        self._due(replica, max(self.now, self._reported_at[replica] + every))

    def _due(self, replica: int, time: float) -> None:
        """The replica's next report is due then, if none is before."""
        due = self._report_due[replica]
        if due is None or time < due:
            self._report_due[replica] = time
            self._at(time, lambda: self._report(replica, time))

    def _report(self, replica: int, due: float) -> None:
        if self._report_due[replica] != due:
            return
        self._report_due[replica] = None
        self._reported_at[replica] = self.now
        self.replicas[replica].settle(self.now)
        message = self.front.report(replica)
        self._at(self.now + self.limits.report_delay, lambda: self.front.hear(replica, message, self.now))
        self._due(replica, self.now + self.limits.heartbeat)

    def _tick(self) -> None:
        self.front.tick(self.now)
        self._at(self.now + TICK, self._tick)

    def _used_area(self) -> float:
        for replica in self.replicas:
            replica.settle(self.now)
        return sum(replica.used_area for replica in self.replicas)

    def _at(self, time: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time, next(self._numbers), act))
