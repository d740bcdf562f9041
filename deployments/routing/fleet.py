"""The replicas that a ledger knows, indexed so that no decision looks at all of them. Integers only.

Replicas that are sold, and are not kept for one request, stand in shelves: one per pool, block size, and longest
request and capacity, both up to a factor of two. A shelf is sorted by headroom: a sorted list of the distinct values,
and for each the replicas that have it. Within a shelf the score differs by headroom and by the prompts that are to be
computed, so its best is one of the roomiest few; equals are drawn at random. What the policy adds where room is ample,
by capacity, is compared between shelves, and so not between replicas whose capacities are closer than that factor.
"""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from deployments.routing.account import ReplicaAccount
from deployments.routing.policy import Size, blocks_for

MOST_ROOMY = 8
"""Of each shelf, so many replicas are compared at most, those with the most headroom: a score is lower than that by
what is to be computed there, which is much on few replicas at a time."""


class ShelfKey(NamedTuple):
    """What the replicas of one shelf have in common."""

    pool: str
    block_size: int
    longest_bits: int
    """Bit length of the longest request in tokens."""
    capacity_bits: int
    """Bit length of the capacity in blocks."""


def shelf_of(account: ReplicaAccount) -> ShelfKey:
    """Where a replica belongs for as long as it lives."""
    longest, capacity = account.longest_tokens, account.capacity_blocks
    return ShelfKey(account.state.pool, account.block_size, longest.bit_length(), capacity.bit_length())


@dataclass(slots=True)
class Spot:
    """Where an open replica stands."""

    shelf: ShelfKey
    headroom: int
    position: int
    """In the list of those with equal headroom."""


class Shelf:
    """Open replicas of one kind, by headroom in blocks."""

    def __init__(self, key: ShelfKey) -> None:
        self._key = key
        self._values: list[int] = []
        """The distinct headrooms, ascending."""
        self._with: dict[int, list[ReplicaAccount]] = {}

    @property
    def room_tokens(self) -> int:
        """The largest headroom, in tokens."""
        return self._values[-1] * self._key.block_size if self._values else 0

    def add(self, account: ReplicaAccount) -> Spot:
        """Put a replica where its headroom belongs."""
        headroom = account.headroom_blocks
        if headroom not in self._with:
            insort(self._values, headroom)
            self._with[headroom] = []
        self._with[headroom].append(account)
        return Spot(self._key, headroom, len(self._with[headroom]) - 1)

    def remove(self, spot: Spot) -> ReplicaAccount | None:
        """Take out the replica that stands there.

        Returns:
            The replica that stands there now instead.
        """
        equals = self._with[spot.headroom]
        moved = equals.pop()
        if spot.position < len(equals):
            equals[spot.position] = moved
            return moved
        if not equals:
            del self._with[spot.headroom]
            del self._values[bisect_left(self._values, spot.headroom)]
        return None

    def best(self, size: Size, rng: random.Random) -> ReplicaAccount | None:
        """Of those that could hold the request to its last token, empty or not: the one with the most headroom less
        what is to be computed, if it fits there now; else the one with the most headroom."""
        total = size.prompt_tokens + size.max_tokens
        if total.bit_length() > self._key.longest_bits:
            return None
        needed = blocks_for(size.grant_tokens, self._key.block_size)
        best: tuple[int, ReplicaAccount] | None = None
        left = MOST_ROOMY
        for headroom in reversed(self._values):
            room = headroom * self._key.block_size
            if left <= 0 or (best is not None and (headroom < needed or room <= best[0])):
                break
            for account in self._drawn(headroom, total, rng, left):
                left -= 1
                if best is None or room - account.ahead_tokens > best[0]:
                    best = room - account.ahead_tokens, account
                if best[0] == room:
                    break
        return None if best is None else best[1]

    def _drawn(self, headroom: int, total: int, rng: random.Random, most: int) -> list[ReplicaAccount]:
        """At most so many of those with this headroom that could hold `total` tokens, from a random one on."""
        fitting = self._with[headroom]
        if total.bit_length() == self._key.longest_bits:
            fitting = [account for account in fitting if account.longest_tokens >= total]
        if len(fitting) <= 1:
            return fitting
        first = rng.randrange(len(fitting))
        return (fitting[first : first + most] + fitting[:first])[:most]

    def __iter__(self) -> Iterator[tuple[int, ReplicaAccount]]:
        """(headroom, replica) of all that stand here."""
        return ((headroom, account) for headroom, equals in self._with.items() for account in equals)


class PoolCounts:
    """Sums over the replicas of one pool."""

    def __init__(self) -> None:
        self.alive = 0
        self.sold = 0
        self.free_tokens = 0
        """Headroom of the open ones."""
        self.longest: list[int] = []
        """The longest request of each known replica, in tokens, ascending."""


class Seen(NamedTuple):
    """What a decision depends on, as it was when the replica was last placed."""

    alive: bool
    sold: bool
    headroom: int


class Fleet:
    """All known replicas. Whoever changes an account calls `place` for it afterwards."""

    def __init__(self) -> None:
        self._accounts: dict[str, ReplicaAccount] = {}
        self._seen: dict[str, Seen] = {}
        self._kept: set[str] = set()
        self._spots: dict[str, Spot] = {}
        self._shelves: dict[ShelfKey, Shelf] = {}
        self._pools: dict[str | None, PoolCounts] = {None: PoolCounts()}
        """Pool -> its sums; None: those of all."""

    def __iter__(self) -> Iterator[ReplicaAccount]:
        return iter(self._accounts.values())

    def get(self, replica_id: str) -> ReplicaAccount | None:
        """The account of a replica, or None when it isn't known."""
        return self._accounts.get(replica_id)

    def add(self, account: ReplicaAccount) -> None:
        """Get to know a replica, which is not sold until it is placed."""
        self._accounts[account.state.replica_id] = account
        self._seen[account.state.replica_id] = Seen(False, False, 0)
        for counts in self._sums(account.state.pool):
            insort(counts.longest, account.longest_tokens)

    def remove(self, replica_id: str) -> ReplicaAccount | None:
        """Forget a replica."""
        account = self._accounts.pop(replica_id, None)
        if account is not None:
            self._close(replica_id)
            self._kept.discard(replica_id)
            seen = self._seen.pop(replica_id)
            for counts in self._sums(account.state.pool):
                counts.alive -= seen.alive
                counts.sold -= seen.sold
                del counts.longest[bisect_left(counts.longest, account.longest_tokens)]
        return account

    def place(self, account: ReplicaAccount, *, sold: bool) -> bool:
        """Put a replica where it belongs after a change.

        Args:
            account: of the replica.
            sold: whether requests may be sent to it.

        Returns:
            Whether a request that could not be answered before may be answered now.
        """
        replica_id = account.state.replica_id
        before, now = self._seen[replica_id], Seen(account.alive, sold, account.headroom_blocks)
        if before == now:
            return False
        self._seen[replica_id] = now
        if before[:2] != now[:2]:
            for counts in self._sums(account.state.pool):
                counts.alive += now.alive - before.alive
                counts.sold += now.sold - before.sold
        self._close(replica_id)
        if self.is_open(replica_id):
            self._open(account)
        return before[:2] != now[:2] or now.headroom > before.headroom

    def is_sold(self, account: ReplicaAccount) -> bool:
        """Whether requests may be sent to this life of the replica, perhaps only the one that it is kept for."""
        replica_id = account.state.replica_id
        return self._accounts.get(replica_id) is account and self._seen[replica_id].sold

    def is_open(self, replica_id: str) -> bool:
        """Whether any request may be sent to it."""
        return self._seen[replica_id].sold and replica_id not in self._kept

    def keep(self, account: ReplicaAccount) -> None:
        """Take an open replica out of the choice: it is kept for one request."""
        self._kept.add(account.state.replica_id)
        self._close(account.state.replica_id)

    def give_back(self, account: ReplicaAccount) -> None:
        """Put a replica that was kept back into the choice; nothing when that life of it is gone."""
        replica_id = account.state.replica_id
        if self._accounts.get(replica_id) is account:
            self._kept.discard(replica_id)
            if self.is_open(replica_id):
                self._open(account)

    def best(self, size: Size, pool: str | None, rng: random.Random) -> list[ReplicaAccount]:
        """Open replicas, the best of each shelf: what the policy would pick is among them.

        They could hold the request to its last token; whether there is room now is for the policy to say.
        """
        found = [shelf.best(size, rng) for key, shelf in self._shelves.items() if pool is None or key.pool == pool]
        return [account for account in found if account is not None]

    def room_tokens(self, pool: str | None) -> int:
        """The largest headroom of an open replica."""
        return max((s.room_tokens for key, s in self._shelves.items() if pool is None or key.pool == pool), default=0)

    def free_tokens(self, pool: str | None) -> int:
        """Headroom of all open replicas."""
        return self._pools[pool].free_tokens if pool in self._pools else 0

    def alive(self, pool: str | None) -> int:
        """How many known replicas are alive."""
        return self._pools[pool].alive if pool in self._pools else 0

    def sold(self, pool: str | None) -> int:
        """To how many replicas requests may be sent, those included that are kept for one."""
        return self._pools[pool].sold if pool in self._pools else 0

    def longest_tokens(self, pool: str | None) -> int:
        """The longest request that a known replica could hold, alive or not."""
        return self._pools[pool].longest[-1] if pool in self._pools and self._pools[pool].longest else 0

    def check_integrity(self) -> None:
        """Raise AssertionError when a shelf or a sum differs from the accounts."""
        for name, counts in self._pools.items():
            own = [a for a in self if name is None or a.state.pool == name]
            assert counts.alive == sum(a.alive for a in own), f"pool {name}: {counts.alive} alive"
            sold = sum(self._seen[a.state.replica_id].sold for a in own)
            assert counts.sold == sold, f"pool {name}: {counts.sold} sold, a fresh sum gives {sold}"
            assert counts.longest == sorted(a.longest_tokens for a in own), f"pool {name}: longest requests"
            free = sum(max(0, a.headroom_blocks) * a.block_size for a in own if a.state.replica_id in self._spots)
            assert counts.free_tokens == free, (
                f"pool {name}: {counts.free_tokens} tokens free, a fresh sum gives {free}"
            )
        shelved = {a.state.replica_id: value for shelf in self._shelves.values() for value, a in shelf}
        fresh = {key: a.headroom_blocks for key, a in self._accounts.items() if self.is_open(key)}
        assert shelved == fresh, f"shelves: {shelved}, accounts: {fresh}"

    def _sums(self, pool: str) -> tuple[PoolCounts, PoolCounts]:
        """Those of the pool and those of all."""
        if pool not in self._pools:
            self._pools[pool] = PoolCounts()
        return self._pools[pool], self._pools[None]

    def _open(self, account: ReplicaAccount) -> None:
        key = shelf_of(account)
        if key not in self._shelves:
            self._shelves[key] = Shelf(key)
        spot = self._spots[account.state.replica_id] = self._shelves[key].add(account)
        for counts in self._sums(key.pool):
            counts.free_tokens += max(0, spot.headroom) * key.block_size

    def _close(self, replica_id: str) -> None:
        spot = self._spots.pop(replica_id, None)
        if spot is not None:
            moved = self._shelves[spot.shelf].remove(spot)
            if moved is not None:
                self._spots[moved.state.replica_id].position = spot.position
            for counts in self._sums(spot.shelf.pool):
                counts.free_tokens -= max(0, spot.headroom) * spot.shelf.block_size
