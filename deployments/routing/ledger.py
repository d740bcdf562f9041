"""The truth about promises: a deterministic state machine that grants blocks, queues, and refuses.

Events go in as method calls with the time as an argument; outcomes come out as values. No clock, no thread, no Ray.

What makes a promise safe:

- A grant is charged until its replica says that it ended, or until `expires_at` has passed and every report made
  before that instant has arrived (`silence_s` later): from `expires_at` on the replica refuses it.
- A grant whose client left on the way, or whose ingress fell silent, is revoked: its replica is asked to refuse it, and
  says that it does.
- A replica is sold only after it has answered with this ledger's epoch: from then on it refuses the grants of the
  ledger before, and its reports list all that it took up.
- A replica that falls silent is not sold, and its promises are kept for as long as they could be taken up. Until it is
  forgotten, requests wait for it where there is no other.

Reports may be duplicated, reordered, or up to `silence_s - heartbeat` late (2 s with a heartbeat each second), and the
clocks of the machines may differ by what is left of that.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from deployments.protocol import Grant, IngressNotice, LedgerNews, Refusal, ReplicaState, ReserveRequest, mismatch
from deployments.routing import refusals
from deployments.routing.account import ReplicaAccount
from deployments.routing.books import Books
from deployments.routing.choice import Choice
from deployments.routing.fairness import FairShares
from deployments.routing.growth import Growth
from deployments.routing.policy import Size
from deployments.routing.refusals import LedgerConfig
from deployments.routing.turns import Outcome, Turns
from deployments.routing.view import LedgerView
from deployments.routing.waiting import Waiter, WaitingQueue

END_REPORTS_PER_S = 500
"""Most reports a second, of all replicas together, that are asked for beyond the usual ones."""


@dataclass(frozen=True, slots=True)
class Queued:
    """The request waits; `tick`, `admit` or `displaced` will answer it."""

    request_id: str


class Ledger:
    """Grants, the waiting queue and the replicas' accounts of one model.

    Args:
        config: limits and durations.
        epoch: greater than any earlier ledger's; its start time in nanoseconds.
        now: Unix seconds. A `now` before an earlier one counts as that earlier one.
        rng: breaks ties.
    """

    def __init__(self, config: LedgerConfig, *, epoch: int, now: float, rng: random.Random) -> None:
        self.config = config
        self.epoch = epoch
        self._now = now
        self._warm_at = now + config.lease_s
        self._warming = True
        self._growth = Growth(config.scaled, config.pools)
        self._books = Books(config, self._growth, epoch=epoch, stir=lambda freed: self._turns.stir(freed))
        self._fleet, self._lengths, self._forecast = self._books.fleet, self._books.lengths, self._books.forecast
        self._choice = Choice(self._fleet, self._books.prefixes, rng)
        self._queue = WaitingQueue(FairShares(dict(config.tenant_weights)))
        self._turns = Turns(self._queue, self._fleet, rng)
        self._displaced: dict[str, Refusal] = {}
        """Request id -> the answer of a waiter that made room for another tenant's, not fetched yet."""
        self._leases: dict[str, float] = {}

    # Events

    def reserve(self, request: ReserveRequest, now: float) -> Grant | Queued | Refusal:
        """Answer one request.

        Raises:
            ValueError: a request of this id waits already.
        """
        now = self._advance(now)
        refusal = refusals.malformed(self.config, request)
        if refusal is not None:
            return refusal
        if request.request_id in self._queue or request.request_id in self._displaced:
            raise ValueError(f"request {request.request_id} waits already; ids must be unique while they are in use")
        self._leases[request.ingress_id] = now + self.config.lease_s
        size = self._lengths.size(request.prompt_tokens, request.max_tokens)
        warming = self._still_warming(now)
        if not warming:
            refusal = self._hopeless(request, size)
            if refusal is not None:
                return refusal
            if not self._queue:
                grant = self._try_grant(request, size, now)
                if grant is not None:
                    return grant
        tokens = self._tokens_before(request, size)
        if self._is_full_for(request) and not self._displace_for(request, now):
            return refusals.full(self.config, request, len(self._queue), self._forecast.retry_after_s(tokens, now))
        waiter = Waiter(
            request,
            size,
            joined_at=now,
            deadline=now + request.wait_limit_s,
            forecast_ms=self._forecast.wait_ms(tokens, now),
        )
        return self._turns.join(waiter, None if warming else self._answer, now) or Queued(request.request_id)

    def cancel(self, request_id: str, now: float) -> None:
        """The client left before it had an answer: ends its waiting, or the grant that no replica has heard of."""
        self._advance(now)
        if self._displaced.pop(request_id, None) is not None:
            return
        if self._turns.leave(request_id) is None and (grant_id := self._books.grant_of(request_id)) is not None:
            self.release(grant_id, now)

    def release(self, grant_id: str, now: float) -> None:
        """Give back a grant that no replica took up. One that ended, is unknown, or is held by its replica stays as is.

        A grant that was taken up needs no release: its blocks are free when the replica's report says so, because the
        last step that names them may still be running when the ingress has its last token.
        """
        self._books.release(grant_id, self._advance(now))

    def revoke(self, grant_id: str) -> None:
        """Nobody waits for this grant any more, but its replica may have taken it up, or may yet."""
        self._books.revoke(grant_id)

    def revoked(self, replica_id: str) -> tuple[tuple[str, float], ...]:
        """What the replica is to be told with the answer to its report: `ReportAnswer.revoked`."""
        return self._books.revoked(replica_id)

    def report(self, state: ReplicaState, now: float) -> int:
        """Take in a replica's report.

        Returns:
            This ledger's epoch, from which the replica learns whose grants to refuse.

        Raises:
            ValueError: the report's protocol version is not this ledger's.
        """
        now = self._advance(now)
        if (reason := mismatch(state, "this ledger")) is not None:
            raise ValueError(f"replica {state.replica_id}: {reason}")
        self._books.hear(state, now, held_back=bool(self._queue))
        self._still_warming(now)
        return self.epoch

    def replica_gone(self, replica_id: str, epoch: int) -> None:
        """A call found the replica dead or gone: sell nothing on it until it reports again."""
        self._books.lose(replica_id, epoch)

    def renew_lease(self, ingress_id: str, now: float) -> None:
        """The ingress is alive."""
        self._leases[ingress_id] = self._advance(now) + self.config.lease_s

    def notice(self, notice: IngressNotice, now: float) -> None:
        """Everything an ingress has to say at once.

        Raises:
            ValueError: the notice's protocol version is not this ledger's.
        """
        if (reason := mismatch(notice, "this ledger")) is not None:
            raise ValueError(f"ingress {notice.ingress_id}: {reason}")
        self.renew_lease(notice.ingress_id, now)
        for replica_id, epoch in notice.lost:
            self.replica_gone(replica_id, epoch)
        for grant_id in notice.unused:
            self.release(grant_id, now)
        for grant_id in notice.left:
            self.revoke(grant_id)
        for request_id in notice.cancelled:
            self.cancel(request_id, now)

    def tick(self, now: float) -> list[Outcome]:
        """Let time pass: silence, leases, expired grants, deadlines; then serve the queue.

        Returns:
            An answer for each waiter that is done with waiting.
        """
        now = self._advance(now)
        self._books.expire(now)
        self._books.note_silence(now)
        outcomes = self._drop_lapsed(now)
        outcomes += self._refuse_overdue(now)
        return outcomes + self.admit(now)

    def admit(self, now: float) -> list[Outcome]:
        """Answer all those who wait and can be answered. Costs nothing when nothing has changed since the last time."""
        now = self._advance(now)
        outcomes = self.displaced()
        if self._still_warming(now):
            return outcomes
        while (outcome := self._turns.next(self._answer, now)) is not None:
            outcomes.append(outcome)
        return outcomes

    def displaced(self) -> list[Outcome]:
        """The answers of those that had to make room for another tenant's requests; each is told once."""
        outcomes: list[Outcome] = list(self._displaced.values())
        self._displaced.clear()
        return outcomes

    def news(self) -> LedgerNews:
        """What an ingress is told each second."""
        contexts, warming = self._growth.contexts(self._books.known_contexts()), self._still_warming(self._now)
        return LedgerNews(
            epoch=self.epoch,
            max_context=None if self._growth.unheard(None) else max(contexts.values(), default=None),
            living_contexts=() if warming else tuple(sorted(self._books.sold_contexts().items())),
            pool_contexts=tuple(contexts.items()),
            warming=warming,
            expected_output_tokens=self._lengths.expected(),
            spots=self._books.spots(),
            silent=self._books.silent(self._now),
            wake=self._growth.to_wake(self._queue.sums(), self._fleet, self._now),
        )

    def end_within_ms(self) -> int | None:
        """How soon replicas are to report that requests ended: the sooner the fewer they are; None while nobody waits.

        Until the ledger knows of an end, what it freed stands empty.
        """
        return self._fleet.alive(None) * 1000 // END_REPORTS_PER_S if self._queue else None

    def waiting_tokens(self, pool: str) -> int:
        """What waits for a pool that scales: grants, in tokens."""
        return self._growth.waiting_tokens(pool, self._queue.sums(), self._fleet)

    def view(self, now: float) -> LedgerView:
        """A snapshot."""
        return LedgerView(
            model=self.config.model,
            epoch=self.epoch,
            warming=self._still_warming(self._advance(now)),
            waiting=len(self._queue),
            waiting_tokens=self._queue.tokens,
            expected_output_tokens=self._lengths.expected(),
            replicas=self._books.views(self._now),
            forecast=self._forecast.error,
            starts_on_demand=self._growth.from_none,
            waiting_by_pool=self._queue.by_pool(),
        )

    def check_integrity(self, *, prefixes: bool = True) -> None:
        """Raise AssertionError, with the numbers, when a sum or an index is wrong.

        Args:
            prefixes: look at what replicas have cached too: a pass over all of it, and no grant's safety rests on it.
        """
        self._turns.check_integrity()
        self._books.check_integrity(prefixes=prefixes)

    # Deciding

    def _answer(self, waiter: Waiter, kept: ReplicaAccount | None, now: float) -> Outcome | None:
        request, size = waiter.request, waiter.size
        if waiter.deadline <= now:
            return self._late(waiter, now)
        outcome = self._hopeless(request, size) or self._try_grant(request, size, now, kept)
        if isinstance(outcome, Grant):
            self._forecast.granted(waiter.forecast_ms, int(1000 * (now - waiter.joined_at)))
        return outcome

    def _try_grant(
        self, request: ReserveRequest, size: Size, now: float, kept: ReplicaAccount | None = None
    ) -> Grant | None:
        if (chosen := self._choice.best(request, size, kept)) is None:
            return None
        account, match = chosen
        return self._books.grant(request, size, account, match, now)

    def _still_warming(self, now: float) -> bool:
        if self._warming:
            self._warming = now < self._warm_at and self._books.acquainted < self.config.expected_replicas
            self._turns.stir()
        return self._warming

    def _hopeless(self, request: ReserveRequest, size: Size) -> Refusal | None:
        pool, total = request.pool, size.prompt_tokens + size.max_tokens
        alive = self._fleet.alive(pool) > 0 or self._books.may_return(pool)
        if (alive and total <= self._fleet.longest_tokens(pool)) or self._growth.may_hold(pool, total):
            return None
        startable = self._growth.startable(pool)
        known = [account for account in self._fleet if pool is None or account.state.pool == pool]
        return refusals.hopeless(
            self.config,
            request,
            size,
            [*known, *startable],
            alive=alive or bool(startable),
            absent=self._growth.shapes(pool),
            unheard=self._growth.unheard(pool),
        )

    def _is_full_for(self, request: ReserveRequest) -> bool:
        """Whether as many wait as may. Who lost a replica waits all the same: those had room there."""
        return len(self._queue) >= self.config.queue_limit and not request.resumes

    def _displace_for(self, request: ReserveRequest, now: float) -> bool:
        """Make room in the full queue for a tenant that has less than its share of it, if there is one with more."""
        last = self._queue.displaced_by(request, self.config.queue_limit)
        if last is None:
            return False
        waiting, tokens = len(self._queue), self._tokens_before(last.request, last.size)
        again_s = self._forecast.retry_after_s(tokens, now)
        self._turns.leave(last.request.request_id)
        self._displaced[last.request.request_id] = refusals.displaced(self.config, last.request, waiting, again_s)
        return True

    def _late(self, waiter: Waiter, now: float) -> Refusal:
        tokens = self._tokens_before(waiter.request, waiter.size)
        again_s, there = self._forecast.retry_after_s(tokens, now), self._fleet.sold(waiter.request.pool) > 0
        return refusals.late(self.config, waiter.request, waiter.size, again_s, there=there)

    def _tokens_before(self, request: ReserveRequest, size: Size) -> int:
        """Tokens that must become free before all that go before this request, and this request, have found room."""
        return self._queue.tokens_before(request) + size.grant_tokens - self._fleet.free_tokens(request.pool)

    # Time

    def _advance(self, now: float) -> float:
        if now > self._now:
            self._now = now
        return self._now

    def _drop_lapsed(self, now: float) -> list[Outcome]:
        outcomes: list[Outcome] = []
        for ingress_id in [key for key, until in self._leases.items() if until <= now]:
            del self._leases[ingress_id]
            self._books.revoke_all_of(ingress_id)
            for request_id in self._queue.of_ingress(ingress_id):
                self._turns.leave(request_id)
                outcomes.append(refusals.lapsed(self.config, request_id, ingress_id))
        return outcomes

    def _refuse_overdue(self, now: float) -> list[Outcome]:
        outcomes: list[Outcome] = []
        while (waiter := self._queue.overdue(now)) is not None:
            self._turns.leave(waiter.request.request_id)
            outcomes.append(self._late(waiter, now))
        return outcomes
