"""Which granules of prompts the KV cache holds, who uses them, and what of it is news. Integers only; no tensors.

A granule is a run of tokens that whole blocks hold (`deployments.granules`). The block that completes it stands for it.
A granule is *used* by a request whose table holds it and all granules before it under their digests, from the first
block on: then every block of that prefix is referenced, and another request that begins alike will share them.
"""

from __future__ import annotations

from deployments.protocol import CachedGranules

_GONE, _IDLE, _USED = range(3)


class PrefixIndex:
    """Granules by the block that completes them, with the number of requests that use each."""

    def __init__(self) -> None:
        self._hash_of: dict[int, int] = {}
        self._users: dict[int, int] = {}
        self._news: dict[int, int] = {}
        """Hash -> its newest state, where that may have changed since the news were last taken."""
        self._told: dict[int, int] = {}
        """Hash -> its state as of the news last taken; none that are gone."""
        self.shared = 0
        """Granules that users need not hold because another has them: the sum of (users - 1) over those with users."""

    def add(self, block: int, granule: int) -> None:
        """The block completes a granule of this hash, and can be matched from now on."""
        self._hash_of[block] = granule
        self._users[block] = 0
        self._news[granule] = _IDLE

    def drop(self, block: int) -> None:
        """The block is evicted; one that completes no granule is none of this index's."""
        granule = self._hash_of.pop(block, None)
        if granule is not None:
            del self._users[block]
            self._news[granule] = _GONE

    def enter(self, block: int) -> None:
        """One more request uses the block's granule."""
        self._users[block] += 1
        if self._users[block] == 1:
            self._news[self._hash_of[block]] = _USED
        else:
            self.shared += 1

    def leave(self, block: int) -> None:
        """One request less uses it."""
        self._users[block] -= 1
        if self._users[block] == 0:
            self._news[self._hash_of[block]] = _IDLE
        else:
            self.shared -= 1

    def take_news(self) -> CachedGranules:
        """What changed since the last call."""
        named: tuple[list[int], ...] = ([], [], [])
        for granule, state in self._news.items():
            if self._told.pop(granule, _GONE) != state:
                named[state].append(granule)
            if state != _GONE:
                self._told[granule] = state
        self._news.clear()
        return CachedGranules(used=tuple(named[_USED]), idle=tuple(named[_IDLE]), gone=tuple(named[_GONE]))

    def users(self) -> dict[int, int]:
        """Block -> users of the granule that it completes. A copy, for checks."""
        return dict(self._users)
