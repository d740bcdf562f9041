"""The prefix cache of a simulated replica: granules with reference counts, the idle ones evicted least recently used.

Counted in granules where the engine's block manager counts blocks; otherwise its rules: a granule that a running
sequence uses stays, an idle one takes no room that a sequence wants.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class PrefixCache:
    """Which granules are there: id -> users, or idle."""

    def __init__(self) -> None:
        self._users: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def idle(self) -> int:
        """Granules that nobody uses and that could be matched."""
        return len(self._idle)

    def known(self) -> tuple[set[int], set[int]]:
        """Ids of the granules in use, and of the idle ones."""
        return set(self._users), set(self._idle)

    def match(self, granules: Sequence[int]) -> int:
        """Leading granules that are there."""
        for count, granule in enumerate(granules):
            if granule not in self._users and granule not in self._idle:
                return count
        return len(granules)

    def idle_among(self, granules: Iterable[int]) -> int:
        """How many of these are there and idle."""
        return sum(granule in self._idle for granule in granules)

    def use(self, granules: Iterable[int]) -> None:
        """One more user of each of these, which are there."""
        for granule in granules:
            self._idle.pop(granule, None)
            self._users[granule] = self._users.get(granule, 0) + 1

    def add(self, granule: int) -> bool:
        """A user computed this granule; False when another one holds the same content already."""
        if granule in self._users or granule in self._idle:
            return False
        self._users[granule] = 1
        return True

    def leave(self, granules: Sequence[int]) -> int:
        """One user less of each; returns how many became idle. The tail of a prefix is evicted first."""
        freed = 0
        for granule in reversed(granules):
            self._users[granule] -= 1
            if self._users[granule] == 0:
                del self._users[granule]
                self._idle[granule] = None
                freed += 1
        return freed

    def add_idle(self, granules: Sequence[int]) -> None:
        """Content that a sequence left behind when it ended."""
        for granule in reversed(granules):
            if granule not in self._users and granule not in self._idle:
                self._idle[granule] = None

    def shrink(self, most: int) -> None:
        """Evict until at most so many idle granules are left."""
        while len(self._idle) > most:
            self._idle.popitem(last=False)
