"""What the ledger knows and has promised of one replica. Integers only; time comes from the caller.

A replica is charged, for each grant, the more of what was promised and what it reports to hold, and all that it
reports under grant ids that the ledger doesn't know: an earlier ledger's, or requests just released but not ended yet.
Blocks that requests share are in what each of them holds; the report says how many that is too much, once for all.
A grant that counts on sharing is charged in full as soon as a report shows that nobody uses what it was to share.
Who takes no more requests at once has no room, whatever is left of its blocks.
A grant leaves the account when the replica's own word, or time, proves that it holds nothing under it.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from deployments.protocol import Grant, ReplicaSpot, ReplicaState
from deployments.routing.policy import Size


@dataclass(slots=True)
class Promise:
    """One grant that may still cost the replica blocks."""

    grant: Grant
    size: Size
    blocks: int
    """What is set aside for it: what was granted; more once it can't count on sharing, or outgrew that."""
    ingress_id: str
    """Whose request it is for."""
    shares: int | None
    """The granule that must be in use for it to share as granted; None when it shares nothing."""
    listed: bool = False
    """The replica has reported to hold it."""
    ahead_tokens: int = 0
    """What of its prompt is to be computed, until a second report lists it."""
    revoked: bool = False
    """Nobody waits for it: the replica is asked to refuse it, and charged until it says that it will."""


class ReplicaAccount:
    """One life (epoch) of one replica."""

    def __init__(self, state: ReplicaState, now: float) -> None:
        self.state = state
        self.block_size = state.block_size
        """Tokens per block; this and the next three are the same in all reports of one life."""
        self.capacity_blocks = state.capacity_blocks
        """Blocks that the replica has."""
        self.max_context = state.max_context
        """Longest prompt + output, in tokens."""
        self.longest_tokens = min(state.max_context, state.capacity_blocks * state.block_size)
        """The longest request that the empty replica could hold to its last token."""
        self.heard_at = now
        self.alive = True
        self.called_gone = False
        """Whether a call found this life of it dead or gone since its last report."""
        self.promises: dict[str, Promise] = {}
        self.charged_blocks = 0
        self.charged_requests = 0
        """Promises, and what is reported under grant ids that are not promised."""
        self.ahead_tokens = 0
        """Prompt tokens granted here that are likely not computed yet: those of grants that no report has listed, or
        only one. Reports don't say what was computed, and a prompt takes about as long as they are apart."""
        self.preempted = 0
        """Preemptions that the last report was the first to tell of."""
        self._held: dict[str, int] = {}
        self._adopt(state, now)

    @property
    def headroom_blocks(self) -> int:
        """Blocks neither held nor promised; negative when requests grew beyond their grants. None where as many
        requests are as the replica takes: it would refuse one more."""
        free = self.capacity_blocks - self.charged_blocks
        return min(0, free) if self.is_full else free

    @property
    def may_return(self) -> bool:
        """Whether it is merely silent: on a machine that is overloaded heartbeats come late."""
        return not (self.alive or self.called_gone or self.state.draining)

    @property
    def is_full(self) -> bool:
        """Whether as many requests are held or promised as the replica takes at once."""
        most = self.state.max_requests
        return most is not None and self.charged_requests >= most

    @property
    def requests_left(self) -> int | None:
        """How many more requests the replica takes at once; None where only blocks limit them."""
        most = self.state.max_requests
        return None if most is None else max(0, most - self.charged_requests)

    @property
    def held_blocks(self) -> int:
        """Blocks in the replica's last report."""
        return sum(self._held.values()) - self.state.shared_blocks

    def spot(self) -> ReplicaSpot:
        """What an ingress is told of the replica."""
        state = self.state
        return ReplicaSpot(
            replica_id=state.replica_id,
            pool=state.pool,
            epoch=state.epoch,
            block_size=state.block_size,
            capacity_blocks=state.capacity_blocks,
            headroom_blocks=self.headroom_blocks,
            max_context=state.max_context,
            requests_left=self.requests_left,
        )

    def promise(
        self, grant: Grant, size: Size, ingress_id: str, shares: int | None = None, *, cached_tokens: int = 0
    ) -> None:
        """Charge a new grant, which shares blocks for as long as the granule `shares` is in use."""
        ahead = size.prompt_tokens - cached_tokens
        self.promises[grant.grant_id] = Promise(grant, size, grant.blocks, ingress_id, shares, ahead_tokens=ahead)
        self.ahead_tokens += ahead
        self.charged_blocks += grant.blocks
        self.charged_requests += 1

    def revoked(self) -> tuple[tuple[str, float], ...]:
        """(grant id, expiry) of the grants that the replica is to refuse, as far as is known."""
        revoked = (p.grant for p in self.promises.values() if p.revoked and not p.listed)
        return tuple((grant.grant_id, grant.expires_at) for grant in revoked)

    def outgrown(self) -> list[tuple[Promise, int]]:
        """Promises whose requests hold more than was set aside for them, and how many blocks they hold."""
        promises, held = self.promises, self._held
        return [(p, blocks) for key, blocks in held.items() if (p := promises.get(key)) and blocks > p.blocks]

    def set_aside(self, promise: Promise, blocks: int) -> None:
        """Charge an outgrown promise for so many blocks, because it is expected to go on growing."""
        promise.blocks = blocks
        self.charged_blocks = self._charge()

    def end(self, grant_id: str) -> int:
        """Drop a grant from the promises; what the last report lists under it stays charged.

        Returns:
            Blocks that this freed.
        """
        promise = self.promises.pop(grant_id)
        self.ahead_tokens -= promise.ahead_tokens
        self.charged_requests -= grant_id not in self._held
        held = self._held.get(grant_id, 0)
        freed = max(promise.blocks, held) - held
        self.charged_blocks -= freed
        return freed

    def hear(self, state: ReplicaState, now: float, used: Container[int] = ()) -> tuple[tuple[Grant, Size], ...] | None:
        """Take in a report of this epoch.

        Args:
            state: the report.
            now: Unix seconds.
            used: the granules that are in use by this report.

        Returns:
            The grants that the report ended, and their sizes; None for a duplicate or a report older than the last.

        Raises:
            ValueError: the replica's pool or size is another than in the epoch's first report.
        """
        if state.sequence <= self.state.sequence:
            return None
        if _shape(state) != _shape(self.state):
            raise ValueError(
                f"replica {state.replica_id} reports (pool, block_size, capacity_blocks, max_context) = "
                f"{_shape(state)}, but {_shape(self.state)} before: another size needs another epoch"
            )
        return self._adopt(state, now, used)

    def _adopt(self, state: ReplicaState, now: float, used: Container[int] = ()) -> tuple[tuple[Grant, Size], ...]:
        self.preempted = state.preemptions - self.state.preemptions
        self.state, self.heard_at, self.alive, self.called_gone = state, now, True, False
        self._held = dict(state.held)
        gone = {grant_id for grant_id, _, _ in state.ended if grant_id in self.promises}
        for grant_id, promise in self.promises.items():
            if grant_id in self._held:
                if promise.listed:
                    promise.ahead_tokens = 0
                else:  # from here on the report counts what it holds, and all that is shared once
                    promise.listed, promise.blocks = True, promise.grant.blocks + promise.grant.shared_blocks
            elif promise.listed:
                gone.add(grant_id)
            elif promise.shares is not None:
                alone = 0 if promise.shares in used else promise.grant.shared_blocks
                promise.blocks = promise.grant.blocks + alone
        ended = [self.promises.pop(grant_id) for grant_id in sorted(gone)]
        self.ahead_tokens = sum(promise.ahead_tokens for promise in self.promises.values())
        self.charged_blocks, self.charged_requests = self._charge(), self._count()
        return tuple((promise.grant, promise.size) for promise in ended)

    def _charge(self) -> int:
        held = self._held
        promised = sum(max(p.blocks, held.get(key, 0)) for key, p in self.promises.items())
        unpromised = sum(blocks for key, blocks in held.items() if key not in self.promises)
        return promised + unpromised - self.state.shared_blocks

    def _count(self) -> int:
        return len(self.promises) + sum(key not in self.promises for key in self._held)

    def check_integrity(self) -> None:
        """Raise AssertionError when a running sum differs from a fresh one."""
        assert self.charged_requests == self._count(), (
            f"replica {self.state.replica_id}: {self.charged_requests} requests, a fresh count gives {self._count()}"
        )
        ahead = sum(promise.ahead_tokens for promise in self.promises.values())
        assert ahead == self.ahead_tokens, f"replica {self.state.replica_id}: {self.ahead_tokens} ahead, summed {ahead}"
        fresh = self._charge()
        assert fresh == self.charged_blocks, (
            f"replica {self.state.replica_id}: charged {self.charged_blocks} blocks, a fresh sum gives {fresh} "
            f"({len(self.promises)} promises, {len(self._held)} held)"
        )


def _shape(state: ReplicaState) -> tuple[str, int, int, int]:
    return state.pool, state.block_size, state.capacity_blocks, state.max_context
