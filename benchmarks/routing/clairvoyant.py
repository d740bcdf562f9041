"""A reference that no router can be: it knows how long each output will be, and sees every replica without delay.

It bounds what routing could gain. One queue for the whole fleet, with the limits of all others; a request is sent as
soon as it fits on a replica to its last token beside all that runs there, and so almost nothing is ever preempted:

    tokens(t) = sum over those that still run after t steps of (length now + t),  for t = each one's last step

must stay within the replica's blocks. Of the replicas where it fits it takes the one where it leaves most room less
prompts still to be computed, as the ledger does. A sequence whose prompt is not computed yet is taken to decode at
once, which is late by a few steps; hence the few preemptions that are left.
"""

from __future__ import annotations

import random
from bisect import insort
from collections.abc import Callable, Sequence

from benchmarks.routing.front import Actions, Limits
from benchmarks.routing.job import Job
from benchmarks.routing.replica import SimReplica

Order = Callable[[Job], float]
"""The lowest is served first; those for which there is no room are passed."""


def by_arrival(job: Job) -> float:
    """First come, first served."""
    return job.arrival


def by_work(job: Job) -> float:
    """The smallest first: tokens of KV cache times steps."""
    return job.output * (job.prompt + job.output / 2)


REFERENCES: dict[str, Order] = {"clairvoyant": by_arrival, "clairvoyant, small first": by_work}


class ClairvoyantFront:
    """Keeps the queue, and sends what fits to its end.

    Args:
        order: of those who wait.
        replicas: whose state it reads.
        actions: on the world.
        limits: as for all policies; it needs no call and no report.
        rng: breaks ties.
    """

    def __init__(
        self, order: Order, replicas: Sequence[SimReplica], actions: Actions, limits: Limits, rng: random.Random
    ) -> None:
        self.call = 0.0
        self._order = order
        self._replicas = replicas
        self._actions = actions
        self._limits = limits
        self._rng = rng
        self._queue: list[tuple[float, int, Job]] = []

    def arrive(self, job: Job, now: float, /) -> None:
        fits = any(job.prompt + job.max_tokens <= replica.spec.capacity_tokens for replica in self._replicas)
        if not fits or len(self._queue) >= self._limits.queue_per_replica * len(self._replicas):
            self._actions.refuse(job)
        elif (place := self._place(job, now)) is not None:
            self._actions.send(job, place)
        else:
            insort(self._queue, (self._order(job), job.index, job))

    def overdue(self, _job: Job, _now: float, /) -> None:
        pass  # what was sent is in a batch within a step or two; what waits here is looked at by `tick`

    def ended(self, _job: Job, _replica: int, /) -> None:
        pass  # `hear` follows at once, when the replica has begun its next step

    def report(self, _replica: int, /) -> object:
        return None

    def hear(self, _replica: int, _message: object, now: float, /) -> None:
        self._serve(now)

    def end_within(self, _replica: int, /) -> float:
        return 0.0

    def tick(self, now: float, /) -> None:
        for entry in [e for e in self._queue if now - e[2].arrival >= self._limits.wait_limit]:
            self._queue.remove(entry)
            self._actions.refuse(entry[2])
        self._serve(now)

    def _serve(self, now: float) -> None:
        left: list[tuple[float, int, Job]] = []
        room = self._room(now)
        for entry in self._queue:
            job = entry[2]
            place = self._place(job, now) if job.prompt <= room else None
            if place is None:
                left.append(entry)
            else:
                self._actions.send(job, place)
                room = self._room(now)
        self._queue = left

    def _room(self, now: float) -> int:
        """Tokens that are free on the replica that has most of them."""
        for replica in self._replicas:
            replica.settle(now)
        return max(replica.free_blocks * replica.spec.block_size for replica in self._replicas)

    def _place(self, job: Job, now: float) -> int | None:
        """The best replica where the job fits to its last token."""
        best: list[int] = []
        best_score = 0
        for index, replica in enumerate(self._replicas):
            replica.settle(now)
            score = _score(replica, job)
            if score is None or (best and score < best_score):
                continue
            if not best or score > best_score:
                best, best_score = [], score
            best.append(index)
        return self._rng.choice(best) if best else None


def _score(replica: SimReplica, job: Job) -> int | None:
    """Tokens left free, less those of prompts to be computed; None where the job doesn't fit to its last token."""
    size, running = replica.spec.block_size, replica.sequences()
    if replica.ongoing == 0:
        fits = job.prompt + job.max_tokens <= replica.spec.capacity_tokens
        return replica.spec.capacity_tokens - job.prompt if fits else None
    if replica.ongoing >= replica.spec.max_sequences:
        return None
    used = job.prompt + sum(sequence.job.prompt for sequence in replica.waiting)
    ahead = sum(sequence.remaining for sequence in replica.prefilling) + used - job.prompt
    free = replica.free_blocks * size - used
    if free < 0:
        return None
    lengths = [(job.output, job.prompt)]
    for sequence in (*running, *replica.waiting):
        produced = replica.produced(sequence)
        lengths.append((sequence.job.output - produced, sequence.job.prompt + produced))
    return free - ahead if _peak(lengths, size) <= replica.spec.capacity_tokens else None


def _peak(lengths: list[tuple[int, int]], block_size: int) -> int:
    """Most tokens held at once, by (tokens to come, length now) of each; half a block each is lost to rounding."""
    lengths.sort(reverse=True)
    peak = held = 0
    for count, (left, length) in enumerate(lengths, 1):
        held += length + block_size // 2
        peak = max(peak, held + count * left)
    return peak
