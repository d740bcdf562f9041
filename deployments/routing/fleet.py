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
from enum import Enum, auto
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


class PoolCounts:
    """Sums over the replicas of one pool."""

    def __init__(self) -> None:
        self.alive = 0
        self.sold = 0
        self.free_tokens = 0
        """Headroom of the open ones."""
        self.longest: list[int] = []
        """The longest request of each known replica, in tokens, ascending."""


class Change(Enum):
    """Why a request that could not be answered before may be answered now."""

    ROOM = auto()
    """The replica has more room than before."""
    STANDING = auto()
    """It is alive or sold now, or is so no longer."""


@dataclass(slots=True, eq=False)
class Standing:
    """A known replica as it was when it was last placed: all that a decision depends on."""

    account: ReplicaAccount
    shelf: Shelf
    """Where it stands while it is open."""
    sums: tuple[PoolCounts, PoolCounts]
    """Of its pool, and of all."""
    alive: bool = False
    sold: bool = False
    kept: bool = False
    headroom: int = 0
    """In blocks."""
    free_tokens: int = 0
    """The same in tokens, none at least."""
    position: int | None = None
    """Among those of its shelf with equal headroom; None while it is not open."""


class Shelf:
    """Open replicas of one kind, by headroom in blocks."""

    def __init__(self, key: ShelfKey) -> None:
        self._key = key
        self._values: list[int] = []
        """The distinct headrooms, ascending."""
        self._with: dict[int, list[Standing]] = {}

    @property
    def room_tokens(self) -> int:
        """The largest headroom, in tokens."""
        return self._values[-1] * self._key.block_size if self._values else 0

    def add(self, standing: Standing) -> None:
        """Put a replica where its headroom belongs."""
        equals = self._with.get(standing.headroom)
        if equals is None:
            insort(self._values, standing.headroom)
            equals = self._with[standing.headroom] = []
        standing.position = len(equals)
        equals.append(standing)

    def remove(self, standing: Standing) -> None:
        """Take a replica out; one with the same headroom may take its position."""
        assert standing.position is not None, f"{standing.account.state.replica_id} is not on its shelf"
        equals = self._with[standing.headroom]
        moved = equals.pop()
        if moved is not standing:
            equals[standing.position] = moved
            moved.position = standing.position
        standing.position = None
        if not equals:
            del self._with[standing.headroom]
            del self._values[bisect_left(self._values, standing.headroom)]

    def best(self, size: Size, rng: random.Random) -> ReplicaAccount | None:
        """Of those that could hold the request to its last token, empty or not: the one with the most headroom less
        what is to be computed, if it fits there now; else the one with the most headroom."""
        total = size.prompt_tokens + size.max_tokens
        if total.bit_length() > self._key.longest_bits:
            return None
        needed = blocks_for(size.grant_tokens, self._key.block_size)
        best: ReplicaAccount | None = None
        most, left = 0, MOST_ROOMY
        for headroom in reversed(self._values):
            room = headroom * self._key.block_size
            if left <= 0 or (best is not None and (headroom < needed or room <= most)):
                break
            for account in self._drawn(headroom, total, rng, left):
                left -= 1
                ease = room - account.ahead_tokens
                if best is None or ease > most:
                    best, most = account, ease
                if most == room:
                    break
        return best

    def _drawn(self, headroom: int, total: int, rng: random.Random, most: int) -> Iterator[ReplicaAccount]:
        """At most so many of those with this headroom that could hold `total` tokens, from a random one on."""
        fitting = self._with[headroom]
        if total.bit_length() == self._key.longest_bits:
            fitting = [standing for standing in fitting if standing.account.longest_tokens >= total]
        first = rng.randrange(len(fitting)) if len(fitting) > 1 else 0
        return (fitting[first - k].account for k in range(min(most, len(fitting))))

    def __iter__(self) -> Iterator[tuple[int, ReplicaAccount]]:
        """(headroom, replica) of all that stand here."""
        return ((headroom, each.account) for headroom, equals in self._with.items() for each in equals)


class Fleet:
    """All known replicas. Whoever changes an account calls `place` for it afterwards."""

    def __init__(self) -> None:
        self._standings: dict[str, Standing] = {}
        self._shelves: dict[ShelfKey, Shelf] = {}
        self._pools: dict[str | None, PoolCounts] = {None: PoolCounts()}
        """Pool -> its sums; None: those of all."""

    def __iter__(self) -> Iterator[ReplicaAccount]:
        return (standing.account for standing in self._standings.values())

    def get(self, replica_id: str) -> ReplicaAccount | None:
        """The account of a replica, or None when it isn't known."""
        standing = self._standings.get(replica_id)
        return standing.account if standing is not None else None

    def add(self, account: ReplicaAccount) -> None:
        """Get to know a replica, which is not sold until it is placed."""
        key, pool = shelf_of(account), account.state.pool
        shelf = self._shelves.setdefault(key, Shelf(key))
        sums = self._pools.setdefault(pool, PoolCounts()), self._pools[None]
        self._standings[account.state.replica_id] = Standing(account, shelf, sums)
        for counts in sums:
            insort(counts.longest, account.longest_tokens)

    def remove(self, replica_id: str) -> ReplicaAccount | None:
        """Forget a replica."""
        standing = self._standings.pop(replica_id, None)
        if standing is None:
            return None
        self._close(standing)
        longest = standing.account.longest_tokens
        for counts in standing.sums:
            counts.alive -= standing.alive
            counts.sold -= standing.sold
            del counts.longest[bisect_left(counts.longest, longest)]
        return standing.account

    def place(self, account: ReplicaAccount, *, sold: bool) -> Change | None:
        """Put a replica where it belongs after a change.

        Args:
            account: of the replica.
            sold: whether requests may be sent to it.

        Returns:
            What this may mean for requests that could not be answered before; None: nothing.
        """
        standing = self._standings[account.state.replica_id]
        before, headroom = standing.headroom, account.headroom_blocks
        same = standing.alive is account.alive and standing.sold is sold
        if same and headroom == before:
            return None
        self._close(standing)
        for counts in () if same else standing.sums:
            counts.alive += account.alive - standing.alive
            counts.sold += sold - standing.sold
        standing.alive, standing.sold, standing.headroom = account.alive, sold, headroom
        standing.free_tokens = max(0, headroom) * account.block_size
        self._open(standing)
        if not same:
            return Change.STANDING
        return Change.ROOM if headroom > before else None

    def is_sold(self, account: ReplicaAccount) -> bool:
        """Whether requests may be sent to this life of the replica, perhaps only the one that it is kept for."""
        standing = self._standings.get(account.state.replica_id)
        return standing is not None and standing.account is account and standing.sold

    def is_open(self, replica_id: str) -> bool:
        """Whether any request may be sent to it."""
        return self._standings[replica_id].position is not None

    def keep(self, account: ReplicaAccount) -> None:
        """Take an open replica out of the choice: it is kept for one request."""
        standing = self._standings[account.state.replica_id]
        standing.kept = True
        self._close(standing)

    def give_back(self, account: ReplicaAccount) -> None:
        """Put a replica that was kept back into the choice; nothing when that life of it is gone."""
        standing = self._standings.get(account.state.replica_id)
        if standing is not None and standing.account is account:
            standing.kept = False
            self._open(standing)

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
            sold = sum(self._standings[a.state.replica_id].sold for a in own)
            assert counts.sold == sold, f"pool {name}: {counts.sold} sold, a fresh sum gives {sold}"
            assert counts.longest == sorted(a.longest_tokens for a in own), f"pool {name}: longest requests"
            free = sum(max(0, a.headroom_blocks) * a.block_size for a in own if self.is_open(a.state.replica_id))
            assert counts.free_tokens == free, (
                f"pool {name}: {counts.free_tokens} tokens free, a fresh sum gives {free}"
            )
        shelved = {a.state.replica_id: value for shelf in self._shelves.values() for value, a in shelf}
        fresh = {key: s.account.headroom_blocks for key, s in self._standings.items() if s.sold and not s.kept}
        assert shelved == fresh, f"shelves: {shelved}, accounts: {fresh}"

    def _open(self, standing: Standing) -> None:
        if standing.sold and not standing.kept and standing.position is None:
            standing.shelf.add(standing)
            self._count_free(standing, standing.free_tokens)

    def _close(self, standing: Standing) -> None:
        if standing.position is not None:
            standing.shelf.remove(standing)
            self._count_free(standing, -standing.free_tokens)

    def _count_free(self, standing: Standing, tokens: int) -> None:
        for counts in standing.sums:
            counts.free_tokens += tokens
