"""A replica's side of the ledger's contract: whose grants to take up, and what to report. Pure.

A replica takes up a grant once, before `expires_at`, when it names this replica in this life and no newer ledger
is known. All that it took up is in its reports until a report that says it ended has been acknowledged. A grant that is
revoked before it arrives counts as taken up and ended.

While the ledger is gone, ingresses make grants by themselves. Such a local grant is taken up only if its blocks are
free here; and as long as one runs, the ledger's grants are held to that too, because it could not know of it yet.
"""

from __future__ import annotations

from deployments.metrics.vitals import GrantCounts
from deployments.protocol import LOCAL_EPOCH, CachedGranules, Grant, ReplicaState
from deployments.routing.granule_log import GranuleLog


class Admission:
    """The grants that one life of one replica has taken up.

    Args:
        replica_id: Serve's unique id of the replica.
        pool: name of its pool.
        epoch: greater than in any earlier life of this replica.
        block_size: tokens per block.
        capacity_blocks: blocks that it has.
        max_context: longest prompt + output, in tokens.
        max_requests: most requests at once; None: as many as the blocks are enough for.
    """

    def __init__(
        self,
        *,
        replica_id: str,
        pool: str,
        epoch: int,
        block_size: int,
        capacity_blocks: int,
        max_context: int,
        max_requests: int | None = None,
    ) -> None:
        self.replica_id = replica_id
        self.pool = pool
        self.epoch = epoch
        self.block_size = block_size
        self.capacity_blocks = capacity_blocks
        self.max_context = max_context
        self.max_requests = max_requests
        self.ledger_epoch = 0
        self.draining = False
        self.grants = GrantCounts()
        """How the grants of ended requests compared with what they came to need."""
        self.preemptions = 0
        """Since the start of this life; the next report tells."""
        self.changed = True
        """Whether something happened since the last report, which is then due."""
        self.ended = False
        """Whether a request ended since the last report."""
        self._sequence = 0
        self._held: dict[str, tuple[int, int]] = {}
        """Grant id -> (blocks granted, blocks held now), those that it shares included in both."""
        self._shared_blocks = 0
        self._granules = GranuleLog()
        self._local: set[str] = set()
        """Those of the held grants that no ledger made."""
        self._ended: dict[str, tuple[int, int, int]] = {}
        """Grant id -> (prompt tokens, output tokens, sequence of the first report with it; 0 before)."""
        self._spent: dict[str, float] = {}
        """Ids of grants taken up or revoked -> their expiry: a grant is taken up once at most."""

    @property
    def free_blocks(self) -> int:
        """Blocks neither granted nor held; negative when requests grew beyond their grants."""
        charged = sum(max(granted, held) for granted, held in self._held.values())
        return self.capacity_blocks - charged + self._shared_blocks

    @property
    def capacity_tokens(self) -> int:
        """Tokens of KV cache."""
        return self.capacity_blocks * self.block_size

    @property
    def held_tokens(self) -> int:
        """Tokens granted or held."""
        return (self.capacity_blocks - self.free_blocks) * self.block_size

    def take_up(self, grant: Grant | None, now: float) -> str | None:
        """Take a grant up, or say why not.

        Args:
            grant: as the request brought it.
            now: Unix seconds.

        Returns:
            None when it is taken up, else the reason.
        """
        if grant is None:
            return "the request has no grant"
        reason = self._reason_against(grant, now)
        if reason is None:
            self._forget_spent(now)
            self._spent[grant.grant_id] = grant.expires_at
            # Until it shares blocks it is not sure to: what it would share may be given up before it starts.
            self._held[grant.grant_id] = (grant.blocks + grant.shared_blocks, 0)
            if grant.ledger_epoch == LOCAL_EPOCH:
                self._local.add(grant.grant_id)
            self.changed = True
        return reason

    def hold(self, grant_id: str, blocks: int) -> None:
        """The request of this grant holds `blocks` now, those that it shares included."""
        granted, before = self._held[grant_id]
        self._held[grant_id] = (granted, blocks)
        self.changed |= max(granted, before) != max(granted, blocks)

    def share(self, blocks: int) -> None:
        """All requests together hold so many blocks less than one by one, because they share prefixes."""
        self.changed |= blocks != self._shared_blocks
        self._shared_blocks = blocks

    def note_granules(self, news: CachedGranules) -> None:
        """What changed in the prefix cache."""
        self.changed |= self._granules.note(news)

    def lost_touch(self) -> None:
        """The ledger heard nothing for so long that it may have forgotten this replica."""
        self._granules.owe_all()
        self.changed = True

    def end(self, grant_id: str, *, prompt_tokens: int, output_tokens: int) -> None:
        """The request of this grant ended and its blocks are free."""
        granted, _ = self._held.pop(grant_id)
        self.grants = self.grants.with_ended(granted, -(-(prompt_tokens + output_tokens) // self.block_size))
        self._local.discard(grant_id)
        self._ended[grant_id] = (prompt_tokens, output_tokens, 0)
        self.changed = self.ended = True

    def revoke(self, grant_id: str, expires_at: float) -> None:
        """Take this grant up no more, and report it as ended; nothing when it was taken up."""
        if grant_id not in self._spent and grant_id not in self._held:
            self._spent[grant_id] = expires_at
            self._ended[grant_id] = (0, 0, 0)
            self.changed = True

    def drain(self) -> None:
        """Take no new grants; those taken up run to their end."""
        self.changed |= not self.draining
        self.draining = True

    def report(self) -> ReplicaState:
        """The next report."""
        self._sequence += 1
        self.changed = self.ended = False
        for grant_id, (prompt, output, first) in self._ended.items():
            if first == 0:
                self._ended[grant_id] = (prompt, output, self._sequence)
        return ReplicaState(
            replica_id=self.replica_id,
            pool=self.pool,
            epoch=self.epoch,
            sequence=self._sequence,
            block_size=self.block_size,
            capacity_blocks=self.capacity_blocks,
            max_context=self.max_context,
            held=tuple((grant_id, max(granted, held)) for grant_id, (granted, held) in self._held.items()),
            ended=tuple((grant_id, prompt, output) for grant_id, (prompt, output, _) in self._ended.items()),
            draining=self.draining,
            ledger_epoch=self.ledger_epoch,
            shared_blocks=self._shared_blocks,
            granules=self._granules.report(self._sequence),
            preemptions=self.preemptions,
            max_requests=self.max_requests,
        )

    def acknowledge(self, sequence: int, ledger_epoch: int) -> None:
        """The ledger of this epoch answered the report of this sequence; a new ledger is owed a report at once."""
        if ledger_epoch > self.ledger_epoch:
            self.ledger_epoch = ledger_epoch
            self._granules.owe_all()
            self.changed = True
        elif ledger_epoch == self.ledger_epoch:
            self._granules.acknowledge(sequence)
        self._ended = {key: entry for key, entry in self._ended.items() if not 0 < entry[2] <= sequence}

    def _reason_against(self, grant: Grant, now: float) -> str | None:
        if (grant.replica_id, grant.replica_epoch) != (self.replica_id, self.epoch):
            return (
                f"the grant names replica {grant.replica_id} in epoch {grant.replica_epoch}, "
                f"this is {self.replica_id} in {self.epoch}"
            )
        local = grant.ledger_epoch == LOCAL_EPOCH
        if grant.ledger_epoch < self.ledger_epoch and not local:
            return f"the grant is of ledger {grant.ledger_epoch}, and ledger {self.ledger_epoch} has taken over"
        if now >= grant.expires_at:
            return f"the grant expired {now - grant.expires_at:.1f} s ago"
        if self.draining:
            return "the replica is draining"
        if grant.grant_id in self._spent:
            return f"grant {grant.grant_id} was taken up before, or its client has left"
        if self.max_requests is not None and len(self._held) >= self.max_requests:
            return f"{len(self._held)} requests are here, and it takes {self.max_requests} at once"
        if (local or self._local) and grant.blocks > self.free_blocks:
            return f"the request needs {grant.blocks} blocks, and {max(0, self.free_blocks)} are free"
        return None

    def _forget_spent(self, now: float) -> None:
        for grant_id in list(self._spent):
            if self._spent[grant_id] > now:
                break
            del self._spent[grant_id]
