"""A ledger's books: the accounts of all replicas that it knows, and the grants charged to them. Integers only.

Whom to grant is decided elsewhere (`choice.py`), and so is who waits (`turns.py`). Here is what a grant costs, how it
ends, what a replica's report and its silence change, and what is learnt from requests that ended.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator

from deployments.protocol import Grant, ReplicaSpot, ReplicaState, ReserveRequest
from deployments.routing.account import ReplicaAccount
from deployments.routing.fleet import Change, Fleet
from deployments.routing.forecast import Forecast
from deployments.routing.grants import GrantIndex
from deployments.routing.growth import Growth
from deployments.routing.policy import Size, blocks_for, grant_blocks, shared_blocks
from deployments.routing.prefixes import Match, PrefixMap
from deployments.routing.refusals import LedgerConfig
from deployments.routing.sizing import OutputLengths
from deployments.routing.view import ReplicaView, view_of


class Books:
    """Accounts and grants of one ledger.

    Args:
        config: limits and durations.
        growth: learns what the pools' replicas hold.
        epoch: the ledger's.
        stir: called when requests that could not be answered before may be answered now: with a replica that has
            more room than before, or None when replicas came or went.
    """

    def __init__(
        self, config: LedgerConfig, growth: Growth, *, epoch: int, stir: Callable[[ReplicaAccount | None], None]
    ) -> None:
        self._config = config
        self._growth = growth
        self._epoch = epoch
        self._stir = stir
        self.fleet = Fleet()
        self.prefixes = PrefixMap()
        self.lengths = OutputLengths()
        self.forecast = Forecast()
        self._grants = GrantIndex()
        self._heard: OrderedDict[str, None] = OrderedDict()
        """Replica ids, the one that has been silent for the longest time first."""
        self._granted = 0

    # Grants

    def grant(self, request: ReserveRequest, size: Size, account: ReplicaAccount, match: Match, now: float) -> Grant:
        """Charge a new grant to an account where it fits."""
        self._granted += 1
        grant = Grant(
            grant_id=f"{self._epoch:x}-{self._granted:x}",
            request_id=request.request_id,
            pool=account.state.pool,
            replica_id=account.state.replica_id,
            replica_epoch=account.state.epoch,
            ledger_epoch=self._epoch,
            blocks=grant_blocks(account, size, match),
            expires_at=now + self._config.grant_ttl_s,
            shared_blocks=shared_blocks(account, match),
        )
        account.promise(grant, size, request.ingress_id, match.last_used, cached_tokens=match.cached_tokens)
        self._place(account)
        self._grants.add(grant, account, grant.expires_at + self._config.silence_s)
        return grant

    def grant_of(self, request_id: str) -> str | None:
        """Id of a request's newest grant; None when it has none."""
        return self._grants.of_request(request_id)

    def release(self, grant_id: str, now: float) -> None:
        """End a grant that no replica can have taken up. One that ended, is unknown, or is held stays as it is."""
        account = self._grants.account_of(grant_id)
        if account is not None and not account.promises[grant_id].listed:
            self._grants.remove(account.promises[grant_id].grant)
            self.forecast.freed(account.end(grant_id) * account.block_size, now)
            self._place(account)

    def revoke(self, grant_id: str) -> None:
        """Have the replica refuse a grant that may still be on its way there. It is charged until the replica's word,
        so that nothing is sold twice; one that ended, is unknown, or is held stays as it is."""
        account = self._grants.account_of(grant_id)
        if account is not None:
            account.promises[grant_id].revoked = True

    def revoke_all_of(self, ingress_id: str) -> None:
        """The same for all grants of an ingress. Looks at every promise: for rare events."""
        for account in self.fleet:
            for promise in account.promises.values():
                promise.revoked |= promise.ingress_id == ingress_id

    def revoked(self, replica_id: str) -> tuple[tuple[str, float], ...]:
        """(grant id, expiry) of the grants that a replica is to refuse."""
        account = self.fleet.get(replica_id)
        return account.revoked() if account is not None else ()

    def expire(self, now: float) -> None:
        """End the grants that can't be taken up any more, because their time is up."""
        for grant_id in self._grants.expired(now):
            self.release(grant_id, now)

    # Replicas

    def hear(self, state: ReplicaState, now: float, *, held_back: bool) -> None:
        """Take in a replica's report.

        Args:
            state: the report.
            now: Unix seconds.
            held_back: whether requests wait for room.

        Raises:
            ValueError: the replica has another pool or size than before in this epoch.
        """
        account = self.fleet.get(state.replica_id)
        if account is None or state.epoch > account.state.epoch:
            self._meet(state, now)
        elif state.epoch == account.state.epoch:
            self._follow(account, state, now, held_back=held_back)

    def lose(self, replica_id: str, epoch: int) -> None:
        """This life of a replica is dead or gone: it is not sold until it reports again, and keeps its promises."""
        account = self.fleet.get(replica_id)
        if account is not None and account.state.epoch == epoch:
            account.called_gone = True
            self._lose(account)
            self._stir(None)  # those who waited for a silent one to return

    def note_silence(self, now: float) -> None:
        """Lose replicas that fell silent, and forget those from which nothing can come any more."""
        forget_after = self._config.grant_ttl_s + 2 * self._config.silence_s
        for account in list(self._silent(now)):
            self._lose(account)
            if now - account.heard_at > forget_after:
                self._forget(account.state.replica_id)

    def sells(self, account: ReplicaAccount) -> bool:
        """Whether requests may be sent to the replica."""
        return account.alive and not account.state.draining and self._knows_us(account)

    # Looks

    def may_return(self, pool: str | None) -> bool:
        """Whether a known replica is merely silent. Looks at all of them: for when none is alive."""
        return any(account.may_return for account in self.fleet if pool in (None, account.state.pool))

    @property
    def acquainted(self) -> int:
        """How many living replicas know this ledger."""
        return sum(account.alive and self._knows_us(account) for account in self.fleet)

    def known_contexts(self) -> dict[str, int]:
        """Pool -> longest prompt + output in tokens that any of its known replicas holds, silent or not."""
        longest: dict[str, int] = {}
        for account in self.fleet:
            pool = account.state.pool
            longest[pool] = max(longest.get(pool, 0), account.max_context)
        return longest

    def sold_contexts(self) -> dict[str, int]:
        """Pool -> longest prompt + output in tokens that each of its replicas holds to which requests may be sent."""
        least: dict[str, int] = {}
        for account in self.fleet:
            if self.sells(account):
                pool = account.state.pool
                least[pool] = min(least.get(pool, account.max_context), account.max_context)
        return least

    def spots(self) -> tuple[ReplicaSpot, ...]:
        """Replicas to which requests may be sent."""
        return tuple(account.spot() for account in self.fleet if self.sells(account))

    def silent(self, now: float) -> tuple[tuple[str, int], ...]:
        """(replica id, epoch) of those that fell silent."""
        return tuple((account.state.replica_id, account.state.epoch) for account in self._silent(now))

    def views(self, now: float) -> tuple[ReplicaView, ...]:
        """A snapshot of each replica."""
        return tuple(view_of(account, sellable=self.sells(account), now=now) for account in self.fleet)

    def check_integrity(self, *, prefixes: bool = True) -> None:
        """Raise AssertionError, with the numbers, when a sum or an index is wrong; as in `Ledger`."""
        for account in self.fleet:
            account.check_integrity()
        self.fleet.check_integrity()
        if prefixes:
            self.prefixes.check_integrity()
        self._grants.check_integrity(self.fleet)

    def _knows_us(self, account: ReplicaAccount) -> bool:
        return account.state.ledger_epoch == self._epoch

    def _silent(self, now: float) -> Iterator[ReplicaAccount]:
        for replica_id in self._heard:
            account = self.fleet.get(replica_id)
            assert account is not None, f"{replica_id} was heard, but is not known"
            if now - account.heard_at <= self._config.silence_s:
                return
            yield account

    def _place(self, account: ReplicaAccount) -> None:
        """After every change of an account."""
        change = self.fleet.place(account, sold=self.sells(account))
        if change is not None:
            self._stir(account if change is Change.ROOM else None)

    def _meet(self, state: ReplicaState, now: float) -> None:
        """The first report of a replica's life."""
        self._forget(state.replica_id)
        account = ReplicaAccount(state, now)
        self._growth.learn(state)
        self.prefixes.hear(state.replica_id, state.granules)
        self.fleet.add(account)
        self._place(account)
        self._heard[state.replica_id] = None

    def _follow(self, account: ReplicaAccount, state: ReplicaState, now: float, *, held_back: bool) -> None:
        """A later one."""
        before = account.charged_blocks
        if state.sequence > account.state.sequence:
            self.prefixes.hear(state.replica_id, state.granules)
        ended = account.hear(state, now, self.prefixes.used(state.replica_id))
        if ended is None:
            return
        self._heard.move_to_end(state.replica_id)
        self._learn(account, {grant.grant_id: size for grant, size in ended}, held_back=held_back)
        for grant, _ in ended:
            self._grants.remove(grant)
        self.forecast.freed((before - account.charged_blocks) * account.block_size, now)
        self._expect_growth(account)
        self._place(account)

    def _learn(self, account: ReplicaAccount, ended: dict[str, Size], *, held_back: bool) -> None:
        # a revoked grant, which comes without a prompt, says nothing of outputs
        ran = [
            (ended[key].max_tokens, output) for key, prompt, output in account.state.ended if key in ended and prompt
        ]
        self.lengths.caution.learn(preempted=account.preempted, held_back=len(ran) if held_back else 0)
        for max_tokens, output_tokens in ran:
            self.lengths.add(output_tokens, max_tokens)

    def _expect_growth(self, account: ReplicaAccount) -> None:
        """A request that outgrew its promise is charged for what those that got as far went on to produce."""
        for promise, held in account.outgrown():
            size = promise.size
            produced = held * account.block_size - size.prompt_tokens
            expected = size.prompt_tokens + self.lengths.expected_beyond(produced, size.max_tokens)
            account.set_aside(promise, max(held, blocks_for(expected, account.block_size)))

    def _lose(self, account: ReplicaAccount) -> None:
        account.alive = False
        self._place(account)

    def _forget(self, replica_id: str) -> None:
        self.prefixes.forget(replica_id)
        account = self.fleet.remove(replica_id)
        if account is not None:
            del self._heard[replica_id]
            for promise in account.promises.values():
                self._grants.remove(promise.grant)
            self._stir(None)
