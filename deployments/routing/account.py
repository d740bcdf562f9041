"""What the ledger knows and has promised of one replica. Integers only; time comes from the caller.

A replica is charged, for each grant, the more of what was promised and what it reports to hold, and all that it
reports under grant ids that the ledger doesn't know: an earlier ledger's, or requests just released but not ended yet.
A grant leaves the account when the replica's own word, or time, proves that it holds nothing under it.
"""

from __future__ import annotations

from dataclasses import dataclass

from deployments.protocol import Grant, ReplicaSpot, ReplicaState


@dataclass(slots=True)
class Promise:
    """One grant that may still cost the replica blocks."""

    grant: Grant
    listed: bool = False
    """The replica has reported to hold it."""


class ReplicaAccount:
    """One life (epoch) of one replica."""

    def __init__(self, state: ReplicaState, now: float) -> None:
        self.state = state
        self.heard_at = now
        self.alive = True
        self.promises: dict[str, Promise] = {}
        self.charged_blocks = 0
        self._held: dict[str, int] = {}
        self._adopt(state, now)

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self.state.block_size

    @property
    def capacity_blocks(self) -> int:
        """Blocks that the replica has."""
        return self.state.capacity_blocks

    @property
    def max_context(self) -> int:
        """Longest prompt + output, in tokens."""
        return self.state.max_context

    @property
    def headroom_blocks(self) -> int:
        """Blocks neither held nor promised; negative when requests grew beyond their grants."""
        return self.state.capacity_blocks - self.charged_blocks

    @property
    def held_blocks(self) -> int:
        """Blocks in the replica's last report."""
        return sum(self._held.values())

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
        )

    def promise(self, grant: Grant) -> None:
        """Charge a new grant."""
        self.promises[grant.grant_id] = Promise(grant)
        self.charged_blocks += grant.blocks

    def end(self, grant_id: str) -> int:
        """Drop a grant from the promises; what the last report lists under it stays charged.

        Returns:
            Blocks that this freed.
        """
        promise = self.promises.pop(grant_id)
        held = self._held.get(grant_id, 0)
        freed = max(promise.grant.blocks, held) - held
        self.charged_blocks -= freed
        return freed

    def hear(self, state: ReplicaState, now: float) -> tuple[Grant, ...] | None:
        """Take in a report of this epoch.

        Returns:
            The grants that the report ended; None when the report is a duplicate or older than the last.
        """
        if state.sequence <= self.state.sequence:
            return None
        return self._adopt(state, now)

    def _adopt(self, state: ReplicaState, now: float) -> tuple[Grant, ...]:
        self.state, self.heard_at, self.alive = state, now, True
        self._held = dict(state.held)
        gone = {grant_id for grant_id, _, _ in state.ended if grant_id in self.promises}
        for grant_id, promise in self.promises.items():
            if grant_id in self._held:
                promise.listed = True
            elif promise.listed:
                gone.add(grant_id)
        ended = tuple(self.promises.pop(grant_id).grant for grant_id in sorted(gone))
        self.charged_blocks = self._charge()
        return ended

    def _charge(self) -> int:
        held = self._held
        promised = sum(max(p.grant.blocks, held.get(key, 0)) for key, p in self.promises.items())
        return promised + sum(blocks for key, blocks in held.items() if key not in self.promises)

    def check_integrity(self) -> None:
        """Raise AssertionError when the running sum differs from a fresh one."""
        fresh = self._charge()
        assert fresh == self.charged_blocks, (
            f"replica {self.state.replica_id}: charged {self.charged_blocks} blocks, a fresh sum gives {fresh} "
            f"({len(self.promises)} promises, {len(self._held)} held)"
        )
