"""A simulated replica on the clock of the wall: the same steps, blocks and preemptions, in real time. Pure.

Time is in seconds of the simulation throughout: callers divide the wall's by how much slower they run.
"""

from __future__ import annotations

from benchmarks.routing.fleet import ReplicaSpec
from benchmarks.routing.histogram import Histogram
from benchmarks.routing.job import Job
from benchmarks.routing.replica import SimReplica


class Pace:
    """`SimReplica`, brought up to date by whoever has a clock."""

    def __init__(self, spec: ReplicaSpec) -> None:
        self.spec = spec
        self._replica = SimReplica(spec, Histogram())

    @property
    def preemptions(self) -> int:
        """So far."""
        return self._replica.preemptions

    @property
    def used_blocks(self) -> int:
        """Blocks in use by sequences."""
        return self._replica.used_blocks

    @property
    def waiting(self) -> int:
        """Jobs that hold no blocks."""
        return len(self._replica.waiting)

    def submit(self, job: Job, now: float) -> None:
        """A job arrives at `now`, up to which all was caught up with."""
        self._replica.submit(job, now)

    def withdraw(self, job: Job) -> bool:
        """Take out a job that was never admitted to a batch; False when it was."""
        return self._replica.withdraw(job)

    def catch_up(self, now: float) -> list[Job]:
        """Run the steps that end by `now`; returns the jobs that they ended."""
        ended: list[Job] = []
        while (due := self._replica.busy_until) is not None and due <= now:
            ended += self._replica.advance(due)
        self._replica.settle(now)
        return ended

    def progress(self) -> dict[int, tuple[int, int]]:
        """Job index -> (tokens produced, blocks held), of the jobs that have not ended."""
        replica = self._replica
        here = [*replica.waiting, *replica.sequences()]
        return {each.job.index: (replica.produced(each), replica.held_blocks(each)) for each in here}

    def check_integrity(self) -> None:
        """Raise AssertionError when the block accounts don't add up."""
        self._replica.check_integrity()
