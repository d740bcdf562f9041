"""The truth about promises: a deterministic state machine that grants blocks, queues, and refuses.

Events go in as method calls with the time as an argument; outcomes come out as values. No clock, no thread, no Ray.

What makes a promise safe:

- A grant is charged until its replica says that it ended, or until `expires_at` has passed and every report made
  before that instant has arrived (`silence_s` later): from `expires_at` on the replica refuses it.
- A replica is sold only after it has answered with this ledger's epoch: from then on it refuses the grants of the
  ledger before, and its reports list all that it took up.
- A replica that falls silent is not sold, and its promises are kept for as long as they could be taken up.

Reports may be duplicated, reordered, or up to `silence_s - heartbeat` late (2 s with a heartbeat each second), and the
clocks of the machines may differ by what is left of that.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from deployments.protocol import (
    PROTOCOL_VERSION,
    Grant,
    IngressNotice,
    LedgerNews,
    Refusal,
    ReplicaState,
    ReserveRequest,
)
from deployments.routing import refusals
from deployments.routing.account import ReplicaAccount
from deployments.routing.policy import Size, grant_blocks, pick
from deployments.routing.refusals import LedgerConfig
from deployments.routing.sizing import OutputLengths, ReleaseRate
from deployments.routing.view import LedgerView, ReplicaView
from deployments.routing.waiting import Waiter, WaitingQueue


@dataclass(frozen=True, slots=True)
class Queued:
    """The request waits; `tick` or `admit` will answer it."""

    request_id: str


Outcome = Grant | Refusal


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
        self._rng = rng
        self._now = now
        self._warm_at = now + config.lease_s
        self._warming = True
        self._accounts: dict[str, ReplicaAccount] = {}
        self._account_of: dict[str, ReplicaAccount] = {}
        """Grant id -> account, while the grant is promised."""
        self._grant_of: dict[str, str] = {}
        """Request id -> its newest grant, while that is promised."""
        self._expiries: deque[tuple[float, str]] = deque()
        """(instant after which an unlisted grant can't exist, grant id), oldest first."""
        self._queue = WaitingQueue()
        self._leases: dict[str, float] = {}
        self._lengths = OutputLengths()
        self._rate = ReleaseRate()
        self._granted = 0

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
        if request.request_id in self._queue:
            raise ValueError(f"request {request.request_id} waits already; ids must be unique while they are in use")
        self._leases[request.ingress_id] = now + self.config.lease_s
        size = self._lengths.size(request.prompt_tokens, request.max_tokens)
        if not self._still_warming(now):
            refusal = self._hopeless(request, size)
            if refusal is not None:
                return refusal
            if not self._queue:
                grant = self._try_grant(request, size, now)
                if grant is not None:
                    return grant
        if len(self._queue) >= self.config.queue_limit:
            return refusals.full(self.config, request, len(self._queue), self._forecast(request, size, now))
        self._queue.join(Waiter(request, now + request.wait_limit_s, size.grant_tokens))
        return Queued(request.request_id)

    def cancel(self, request_id: str, now: float) -> None:
        """The client left before it had an answer: ends its waiting, or the grant that no replica has heard of."""
        self._advance(now)
        if self._queue.leave(request_id) is None and request_id in self._grant_of:
            self.release(self._grant_of[request_id], now)

    def release(self, grant_id: str, now: float) -> None:
        """Give back a grant that no replica took up. One that ended, is unknown, or is held by its replica stays as is.

        A grant that was taken up needs no release: its blocks are free when the replica's report says so, because the
        last step that names them may still be running when the ingress has its last token.
        """
        now = self._advance(now)
        account = self._account_of.get(grant_id)
        if account is not None and not account.promises[grant_id].listed:
            self._end(grant_id, now)

    def report(self, state: ReplicaState, now: float) -> int:
        """Take in a replica's report.

        Returns:
            This ledger's epoch, from which the replica learns whose grants to refuse.

        Raises:
            ValueError: the report's protocol version is not this ledger's.
        """
        now = self._advance(now)
        if state.version != PROTOCOL_VERSION:
            raise ValueError(
                f"replica {state.replica_id} reports in protocol {state.version}, "
                f"this ledger reads {PROTOCOL_VERSION}: deploy both from one version"
            )
        account = self._accounts.get(state.replica_id)
        if account is None or state.epoch > account.state.epoch:
            self._forget(state.replica_id)
            self._accounts[state.replica_id] = ReplicaAccount(state, now)
        elif state.epoch == account.state.epoch:
            self._hear(account, state, now)
        self._still_warming(now)
        return self.epoch

    def replica_gone(self, replica_id: str, epoch: int) -> None:
        """A call found the replica dead or gone: sell nothing on it until it reports again."""
        account = self._accounts.get(replica_id)
        if account is not None and account.state.epoch == epoch:
            account.alive = False

    def renew_lease(self, ingress_id: str, now: float) -> None:
        """The ingress is alive."""
        self._leases[ingress_id] = self._advance(now) + self.config.lease_s

    def notice(self, notice: IngressNotice, now: float) -> None:
        """Everything an ingress has to say at once."""
        self.renew_lease(notice.ingress_id, now)
        for replica_id, epoch in notice.lost:
            self.replica_gone(replica_id, epoch)
        for grant_id in notice.unused:
            self.release(grant_id, now)
        for request_id in notice.cancelled:
            self.cancel(request_id, now)

    def tick(self, now: float) -> list[Outcome]:
        """Let time pass: silence, leases, expired grants, deadlines; then serve the queue.

        Returns:
            An answer for each waiter that is done with waiting.
        """
        now = self._advance(now)
        self._expire_grants(now)
        self._note_silence(now)
        outcomes = self._drop_lapsed(now)
        outcomes += self._refuse_overdue(now)
        return outcomes + self.admit(now)

    def admit(self, now: float) -> list[Outcome]:
        """Serve the queue from its head for as long as the head can be answered. Cheap when it can't."""
        now = self._advance(now)
        outcomes: list[Outcome] = []
        if self._still_warming(now):
            return outcomes
        while (waiter := self._queue.head()) is not None:
            request = waiter.request
            answer: Outcome | None
            if waiter.deadline <= now:
                answer = self._refuse_late(request, now)
            else:
                size = self._lengths.size(request.prompt_tokens, request.max_tokens)
                answer = self._hopeless(request, size) or self._try_grant(request, size, now)
            if answer is None:
                break
            self._queue.leave(request.request_id)
            outcomes.append(answer)
        return outcomes

    def news(self) -> LedgerNews:
        """What an ingress is told each second."""
        accounts = self._accounts.values()
        quiet = [a.state for a in accounts if self._now - a.heard_at > self.config.silence_s]
        return LedgerNews(
            epoch=self.epoch,
            max_context=max((account.max_context for account in accounts), default=None),
            warming=self._still_warming(self._now),
            expected_output_tokens=self._lengths.expected(),
            spots=tuple(account.spot() for account in accounts if self._sells(account)),
            silent=tuple((state.replica_id, state.epoch) for state in quiet),
        )

    def view(self, now: float) -> LedgerView:
        """A snapshot."""
        return LedgerView(
            model=self.config.model,
            epoch=self.epoch,
            warming=self._still_warming(self._advance(now)),
            waiting=len(self._queue),
            waiting_tokens=self._queue.tokens,
            expected_output_tokens=self._lengths.expected(),
            replicas=tuple(self._view_replica(account) for account in self._accounts.values()),
        )

    def check_integrity(self) -> None:
        """Raise AssertionError, with the numbers, when a sum or an index is wrong."""
        self._queue.check_integrity()
        owned: dict[str, ReplicaAccount] = {}
        for account in self._accounts.values():
            account.check_integrity()
            owned.update(dict.fromkeys(account.promises, account))
        assert owned == self._account_of, f"index of grants: {sorted(owned.keys() ^ self._account_of.keys())} differ"
        for request_id, grant_id in self._grant_of.items():
            assert grant_id in owned, f"request {request_id} points at grant {grant_id}, which has ended"
        pending = {grant_id for _, grant_id in self._expiries}
        endless = [key for key, a in owned.items() if not a.promises[key].listed and key not in pending]
        assert not endless, f"grants that nothing would end: {endless}"

    # Deciding

    def _try_grant(self, request: ReserveRequest, size: Size, now: float) -> Grant | None:
        account = pick(self._sellable(request.pool), size, self._rng)
        if account is None:
            return None
        self._granted += 1
        grant = Grant(
            grant_id=f"{self.epoch:x}-{self._granted:x}",
            request_id=request.request_id,
            pool=account.state.pool,
            replica_id=account.state.replica_id,
            replica_epoch=account.state.epoch,
            ledger_epoch=self.epoch,
            blocks=grant_blocks(account, size),
            expires_at=now + self.config.grant_ttl_s,
        )
        account.promise(grant)
        self._account_of[grant.grant_id] = account
        self._grant_of[request.request_id] = grant.grant_id
        self._expiries.append((grant.expires_at + self.config.silence_s, grant.grant_id))
        return grant

    def _sellable(self, pool: str | None) -> Iterable[ReplicaAccount]:
        return (a for a in self._accounts.values() if self._sells(a) and (pool is None or a.state.pool == pool))

    def _sells(self, account: ReplicaAccount) -> bool:
        return account.alive and not account.state.draining and account.state.ledger_epoch == self.epoch

    def _still_warming(self, now: float) -> bool:
        if self._warming:
            known = sum(a.alive and a.state.ledger_epoch == self.epoch for a in self._accounts.values())
            self._warming = now < self._warm_at and known < self.config.expected_replicas
        return self._warming

    def _hopeless(self, request: ReserveRequest, size: Size) -> Refusal | None:
        pool = request.pool
        known = [a for a in self._accounts.values() if pool is None or a.state.pool == pool]
        return refusals.hopeless(self.config, request, size, known, alive=any(a.alive for a in known))

    def _refuse_late(self, request: ReserveRequest, now: float) -> Refusal:
        size = self._lengths.size(request.prompt_tokens, request.max_tokens)
        return refusals.late(self.config, request, size, self._forecast(request, size, now))

    def _forecast(self, request: ReserveRequest, size: Size, now: float) -> int:
        """Seconds until all that wait, and this request, should have found room."""
        free = sum(max(0, a.headroom_blocks) * a.block_size for a in self._sellable(request.pool))
        return self._rate.wait_for(self._queue.tokens + size.grant_tokens - free, now)

    # Time

    def _advance(self, now: float) -> float:
        self._now = max(self._now, now)
        return self._now

    def _expire_grants(self, now: float) -> None:
        while self._expiries and self._expiries[0][0] <= now:
            grant_id = self._expiries.popleft()[1]
            account = self._account_of.get(grant_id)
            if account is not None and not account.promises[grant_id].listed:
                self._end(grant_id, now)

    def _note_silence(self, now: float) -> None:
        forget_after = self.config.grant_ttl_s + 2 * self.config.silence_s
        for replica_id, account in list(self._accounts.items()):
            quiet = now - account.heard_at
            if quiet > self.config.silence_s:
                account.alive = False
            if quiet > forget_after:
                self._forget(replica_id)

    def _drop_lapsed(self, now: float) -> list[Outcome]:
        outcomes: list[Outcome] = []
        for ingress_id in [key for key, until in self._leases.items() if until <= now]:
            del self._leases[ingress_id]
            for request_id in self._queue.of_ingress(ingress_id):
                self._queue.leave(request_id)
                outcomes.append(refusals.lapsed(self.config, request_id, ingress_id))
        return outcomes

    def _refuse_overdue(self, now: float) -> list[Outcome]:
        outcomes: list[Outcome] = []
        while (waiter := self._queue.overdue(now)) is not None:
            outcomes.append(self._refuse_late(waiter.request, now))
        return outcomes

    # Accounts

    def _hear(self, account: ReplicaAccount, state: ReplicaState, now: float) -> None:
        before = account.charged_blocks
        ended = account.hear(state, now)
        if ended is None:
            return
        for grant in ended:
            self._unlink(grant)
        self._learn(state, {grant.grant_id for grant in ended})
        freed = before - account.charged_blocks
        if freed > 0:
            self._rate.add(freed * account.block_size, now)

    def _learn(self, state: ReplicaState, ended: set[str]) -> None:
        for grant_id, _, output_tokens in state.ended:
            if grant_id in ended:
                self._lengths.add(output_tokens)

    def _end(self, grant_id: str, now: float) -> None:
        account = self._account_of[grant_id]
        grant = account.promises[grant_id].grant
        freed = account.end(grant_id)
        self._unlink(grant)
        if freed > 0:
            self._rate.add(freed * account.block_size, now)

    def _forget(self, replica_id: str) -> None:
        account = self._accounts.pop(replica_id, None)
        if account is not None:
            for promise in account.promises.values():
                self._unlink(promise.grant)

    def _unlink(self, grant: Grant) -> None:
        del self._account_of[grant.grant_id]
        if self._grant_of.get(grant.request_id) == grant.grant_id:
            del self._grant_of[grant.request_id]

    def _view_replica(self, account: ReplicaAccount) -> ReplicaView:
        state = account.state
        return ReplicaView(
            replica_id=state.replica_id,
            pool=state.pool,
            epoch=state.epoch,
            block_size=state.block_size,
            capacity_blocks=state.capacity_blocks,
            charged_blocks=account.charged_blocks,
            held_blocks=account.held_blocks,
            promises=len(account.promises),
            sellable=self._sells(account),
        )
