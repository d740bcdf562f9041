"""What stands between arrivals and replicas: a policy that sends at once, or ledgers that grant, queue and refuse.

Both refuse a request when `queue_limit` requests wait in the whole fleet, and one that waited `wait_limit` seconds.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from benchmarks.routing.baselines import Known, Policy
from benchmarks.routing.job import GRANULE, Job
from benchmarks.routing.replica import SimReplica
from deployments.protocol import CachedGranules, Grant, Prefix, Refusal, ReplicaState, ReserveRequest
from deployments.routing.admission import Admission
from deployments.routing.ledger import Ledger
from deployments.routing.refusals import LedgerConfig
from deployments.routing.turns import Outcome


@dataclass(frozen=True, slots=True)
class Limits:
    """The same for all policies. Seconds, except `queue_per_replica`."""

    report_delay: float = 0.005
    """From a replica to whoever listens."""
    report_every: float = 0.1
    """Reports of one replica are at least so far apart, unless the ledger asks for ends sooner."""
    look: float = 0.02
    """How often a replica looks whether to report an end sooner."""
    heartbeat: float = 1.0
    ledger_call: float = 0.003
    """What asking a ledger adds to a request; the others decide in the ingress."""
    queue_per_replica: int = 32
    """Requests that may wait, for each replica of the fleet; where they wait is the policy's affair."""
    wait_limit: float = 30.0
    """Longest wait for a place in a batch."""


class Actions(Protocol):
    """What a front may do to the simulated world."""

    def send(self, job: Job, replica: int) -> None:
        """Hand the job to a replica now."""

    def refuse(self, job: Job) -> None:
        """The job ends unserved."""


class Front(Protocol):
    """Reactions to what happens. `report` and `hear` are the two ends of a replica's message."""

    call: float
    """Seconds between a request's arrival and `arrive`."""

    def arrive(self, job: Job, now: float, /) -> None:
        """A request."""

    def overdue(self, job: Job, now: float, /) -> None:
        """The job's wait limit has passed, and it has no token yet."""

    def ended(self, job: Job, replica: int, /) -> None:
        """The replica produced the job's last token."""

    def report(self, replica: int, /) -> object:
        """What the replica says now."""

    def hear(self, replica: int, message: object, now: float, /) -> None:
        """Its message arrives."""

    def end_within(self, replica: int, /) -> float:
        """Seconds after its last report in which the replica tells of an end; `report_every` unless requests wait."""

    def tick(self, now: float, /) -> None:
        """Time passes."""


class DirectFront:
    """Sends each request at once to the replica that a policy picks."""

    def __init__(
        self, policy: Policy, replicas: Sequence[SimReplica], actions: Actions, limits: Limits, rng: random.Random
    ) -> None:
        self.call = 0.0
        self._policy = policy
        self._replicas = replicas
        self._actions = actions
        self._queue_limit = limits.queue_per_replica * len(replicas)
        self._report_every = limits.report_every
        self._rng = rng
        self._known = [Known(index, replica.spec) for index, replica in enumerate(replicas)]
        self._place: dict[int, int] = {}
        """Job index -> replica, until it ends."""

    def arrive(self, job: Job, _now: float, /) -> None:
        need = job.prompt + job.max_tokens
        fitting = [known for known in self._known if need <= known.spec.capacity_tokens]
        # The count of waiting requests is exact; a real router's would be a guess.
        if not fitting or sum(len(replica.waiting) for replica in self._replicas) >= self._queue_limit:
            self._actions.refuse(job)
            return
        chosen = self._policy(job, fitting, self._rng)
        chosen.ongoing += 1
        self._place[job.index] = chosen.index
        self._actions.send(job, chosen.index)

    def overdue(self, job: Job, _now: float, /) -> None:
        place = self._place.get(job.index)
        if place is not None and self._replicas[place].withdraw(job):
            self._leave(job)
            self._actions.refuse(job)

    def ended(self, job: Job, _replica: int, /) -> None:
        self._leave(job)

    def report(self, replica: int, /) -> float:
        it = self._replicas[replica]
        return it.used_blocks / it.spec.capacity_blocks

    def hear(self, replica: int, message: object, _now: float, /) -> None:
        assert isinstance(message, float)
        self._known[replica].kv_usage = message

    def end_within(self, _replica: int, /) -> float:
        return self._report_every

    def tick(self, _now: float, /) -> None:
        pass

    def _leave(self, job: Job) -> None:
        self._known[self._place.pop(job.index)].ongoing -= 1


class LedgerFront:
    """The service's own ledger and the replicas' side of its contract; several ledgers share the fleet evenly."""

    def __init__(
        self, replicas: Sequence[SimReplica], actions: Actions, limits: Limits, rng: random.Random, ledgers: int = 1
    ) -> None:
        self.call = limits.ledger_call
        self._replicas = replicas
        self._actions = actions
        self._limits = limits
        self._rng = rng
        self._jobs: dict[str, Job] = {}
        self._grants: dict[int, Grant] = {}
        self._ledgers: list[Ledger] = []
        self._admissions: list[Admission] = []
        self._cached: list[tuple[set[int], set[int]]] = [(set(), set()) for _ in replicas]
        """The granules in use and the idle ones of each replica, as of its last report."""
        self._end_within = [limits.report_every] * len(replicas)
        for index in range(ledgers):
            share = len(range(index, len(replicas), ledgers))
            config = LedgerConfig("model", expected_replicas=share, queue_limit=limits.queue_per_replica * share)
            self._ledgers.append(Ledger(config, epoch=1, now=0.0, rng=random.Random(rng.random())))
        for index, replica in enumerate(replicas):
            self._admissions.append(_admission(index, replica))
            for _ in range(2):  # the answer to the first report tells the ledger's epoch; the second says it is known
                self.hear(index, self.report(index), 0.0)

    def arrive(self, job: Job, now: float, /) -> None:
        ledger = self._rng.choice(self._ledgers)
        request = ReserveRequest(
            request_id=str(job.index),
            ingress_id="ingress",
            prompt_tokens=job.prompt,
            max_tokens=job.max_tokens,
            wait_limit_s=self._limits.wait_limit,
            prefix=_prefix(job),
        )
        self._jobs[request.request_id] = job
        outcome = ledger.reserve(request, now)
        if isinstance(outcome, Grant | Refusal):
            self._act(outcome, now)

    def overdue(self, _job: Job, _now: float, /) -> None:
        pass  # the ledger knows the deadline, and a granted job is in a batch within a step or two

    def ended(self, job: Job, replica: int, /) -> None:
        grant = self._grants.pop(job.index)
        self._admissions[replica].end(grant.grant_id, prompt_tokens=job.prompt, output_tokens=job.output)

    def report(self, replica: int, /) -> ReplicaState:
        it, admission = self._replicas[replica], self._admissions[replica]
        for sequence in it.sequences():
            admission.hold(self._grants[sequence.job.index].grant_id, it.held_blocks(sequence))
        admission.share(it.shared_blocks)
        admission.preemptions = it.preemptions
        admission.note_granules(self._granule_news(replica))
        return admission.report()

    def hear(self, replica: int, message: object, now: float, /) -> None:
        assert isinstance(message, ReplicaState)
        ledger = self._ledgers[replica % len(self._ledgers)]
        epoch = ledger.report(message, now)
        self._admissions[replica].acknowledge(message.sequence, epoch)
        self._act_all(ledger.admit(now), now)
        limits, within_ms = self._limits, ledger.end_within_ms()
        asked = limits.report_every if within_ms is None else max(limits.look, within_ms / 1000)
        self._end_within[replica] = min(limits.report_every, asked)

    def end_within(self, replica: int, /) -> float:
        return self._end_within[replica]

    def tick(self, now: float, /) -> None:
        for ledger in self._ledgers:
            ledger.renew_lease("ingress", now)
            self._act_all(ledger.tick(now), now)

    def _granule_news(self, replica: int) -> CachedGranules:
        """What changed in the prefix cache since the last report."""
        used, idle = self._replicas[replica].cache.known()
        was_used, was_idle = self._cached[replica]
        self._cached[replica] = used, idle
        return CachedGranules(
            used=tuple(sorted(used - was_used)),
            idle=tuple(sorted(idle - was_idle)),
            gone=tuple(sorted((was_used | was_idle) - used - idle)),
        )

    def _act_all(self, outcomes: list[Outcome], now: float) -> None:
        for outcome in outcomes:
            self._act(outcome, now)

    def _act(self, outcome: Outcome, now: float) -> None:
        job = self._jobs.pop(outcome.request_id)
        if isinstance(outcome, Refusal):
            self._actions.refuse(job)
            return
        replica = int(outcome.replica_id)
        reason = self._admissions[replica].take_up(outcome, now)
        assert reason is None, reason
        self._grants[job.index] = outcome
        self._actions.send(job, replica)


def _prefix(job: Job) -> Prefix | None:
    shareable = job.granules[: (job.prompt - 1) // GRANULE]
    return Prefix(GRANULE, shareable) if shareable else None


def _admission(index: int, replica: SimReplica) -> Admission:
    spec = replica.spec
    return Admission(
        replica_id=str(index),
        pool="default",
        epoch=1,
        block_size=spec.block_size,
        capacity_blocks=spec.capacity_blocks,
        max_context=spec.capacity_tokens,
    )
