"""References that no router can be: they see all replicas without delay, and all but one know how long outputs will be.

They show what routing could gain. One queue for the whole fleet, with the limits of all others; a request is sent as
soon as it fits on a replica to its last token beside all that runs there, and so almost nothing is ever preempted:

    tokens(t) = sum over those that still run after t steps of (length now + t),  for t = each one's last step

must stay within the replica's blocks. Of the replicas where it fits it takes the one where it leaves most room less
prompts still to be computed, as the ledger does. A sequence whose prompt is not computed yet is taken to decode at
once, which is late by a few steps; hence the few preemptions that are left.

"Forecast peaks" does the same with guesses: a quantile of the outputs lately ended that were longer than what the
sequence has produced. It shows what the rule is worth without knowledge of the future.
"""

from __future__ import annotations

import random
from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.routing.front import Actions, Limits
from benchmarks.routing.job import Job
from benchmarks.routing.replica import SimReplica
from deployments.routing.sizing import OutputLengths

Order = Callable[[Job], float]
"""The lowest is served first; those for which there is no room are passed."""


def by_arrival(job: Job) -> float:
    """First come, first served."""
    return job.arrival


def by_work(job: Job) -> float:
    """The smallest first: tokens of KV cache times steps."""
    return job.output * (job.prompt + job.output / 2)


@dataclass(frozen=True, slots=True)
class Reference:
    """What a reference goes by."""

    order: Order
    guess_percent: int | None = None
    """The quantile of output lengths that it guesses by; None: it knows them."""


REFERENCES = {
    "clairvoyant": Reference(by_arrival),
    "clairvoyant, small first": Reference(by_work),
    "forecast peaks": Reference(by_arrival, guess_percent=25),
}


class ClairvoyantFront:
    """Keeps the queue, and sends what fits to its end.

    Args:
        reference: its order, and what it knows.
        replicas: whose state it reads.
        actions: on the world.
        limits: as for all policies; it needs no call and no report.
        rng: breaks ties.
    """

    def __init__(
        self,
        reference: Reference,
        replicas: Sequence[SimReplica],
        actions: Actions,
        limits: Limits,
        rng: random.Random,
    ) -> None:
        self.call = 0.0
        self._order = reference.order
        percent = reference.guess_percent
        self._lengths = OutputLengths(quantile_percent=percent) if percent is not None else None
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

    def ended(self, job: Job, _replica: int, /) -> None:
        if self._lengths is not None:
            self._lengths.add(job.output, job.max_tokens)  # `hear` follows, when the replica has begun its next step

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
            score = self._score(replica, job)
            if score is None or (best and score < best_score):
                continue
            if not best or score > best_score:
                best, best_score = [], score
            best.append(index)
        return self._rng.choice(best) if best else None

    def _score(self, replica: SimReplica, job: Job) -> int | None:
        """Tokens left free, less those of prompts to be computed; None where the job doesn't fit to its last token."""
        size, running = replica.spec.block_size, replica.sequences()
        if job.prompt + job.max_tokens > replica.spec.capacity_tokens:  # no replica takes more, whatever comes of it
            return None
        if replica.ongoing == 0:
            return replica.spec.capacity_tokens - job.prompt
        if replica.ongoing >= replica.spec.max_sequences:
            return None
        used = job.prompt + sum(sequence.job.prompt for sequence in replica.waiting)
        ahead = sum(sequence.remaining for sequence in replica.prefilling) + used - job.prompt
        free = replica.free_blocks * size - used
        if free < 0:
            return None
        lengths = [(self._to_come(job, 0), job.prompt)]
        for sequence in (*running, *replica.waiting):
            produced = replica.produced(sequence)
            lengths.append((self._to_come(sequence.job, produced), sequence.job.prompt + produced))
        return free - ahead if _peak(lengths, size) <= replica.spec.capacity_tokens else None

    def _to_come(self, job: Job, produced: int) -> int:
        """Tokens that it will still produce, known or guessed."""
        if self._lengths is None:
            return job.output - produced
        return self._lengths.expected_beyond(produced, job.max_tokens) - produced


def _peak(lengths: list[tuple[int, int]], block_size: int) -> int:
    """Most tokens held at once, by (tokens to come, length now) of each; half a block each is lost to rounding."""
    lengths.sort(reverse=True)
    peak = held = 0
    for count, (left, length) in enumerate(lengths, 1):
        held += length + block_size // 2
        peak = max(peak, held + count * left)
    return peak
