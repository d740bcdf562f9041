"""Which replicas have a prompt's prefix cached, as far as their reports tell. Pure; integers only.

A replica is known by id. It says of each granule (`deployments.granules`) whether it is used or idle. Both sets are
closed: with a granule come those before it in its chain, for used ones strictly (one request holds them all), for all
cached ones because the cache evicts a prefix from its tail. So the length of a match is found by bisection, and a
replica that has more of a prompt is found before one that has less. Where a cache breaks the second rule, a match is
longer or shorter than what the replica will find; the score is then a little off, and no grant is.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Container, Sequence
from dataclasses import dataclass, field

from deployments.protocol import CachedGranules, Prefix


@dataclass(frozen=True, slots=True)
class Match:
    """How much of a prompt a replica has cached, in tokens."""

    used_tokens: int = 0
    """Held by a running request: another one shares their blocks."""
    cached_tokens: int = 0
    """Used or idle: need not be computed."""
    last_used: int | None = None
    """The last of the used granules, which is used for as long as all of them are."""


NO_MATCH = Match()


@dataclass(slots=True)
class _Cached:
    """What one replica has."""

    all: set[int] = field(default_factory=set)
    used: set[int] = field(default_factory=set)


class PrefixMap:
    """Granule -> the replicas that have it cached, and the other way round."""

    def __init__(self) -> None:
        self._cached: dict[str, _Cached] = {}
        self._holders: dict[int, tuple[str, ...]] = {}
        """Tuples, because most granules are one replica's alone, and there may be millions."""

    def hear(self, replica_id: str, news: CachedGranules) -> None:
        """Take in a replica's news; those of one replica must come in order."""
        if news.whole:
            self.forget(replica_id)
        elif not (news.used or news.idle or news.gone):
            return
        cached = self._cached.setdefault(replica_id, _Cached())
        for granule in (*news.used, *news.idle):
            if granule not in cached.all:
                cached.all.add(granule)
                self._holders[granule] = (*self._holders.get(granule, ()), replica_id)
        cached.used.update(news.used)
        cached.used.difference_update(news.idle, news.gone)
        for granule in cached.all.intersection(news.gone):
            cached.all.remove(granule)
            self._drop(granule, replica_id)

    def forget(self, replica_id: str) -> None:
        """The replica has nothing any more, or is gone."""
        cached = self._cached.pop(replica_id, None)
        if cached is not None:
            for granule in cached.all:
                self._drop(granule, replica_id)

    def match(self, prefix: Prefix, replica_id: str) -> Match:
        """How much of the prompt the replica has."""
        cached = self._cached.get(replica_id)
        if cached is None:
            return NO_MATCH
        used, known = _leading(prefix.hashes, cached.used), _leading(prefix.hashes, cached.all)
        last_used = prefix.hashes[used - 1] if used else None
        return Match(used * prefix.granule_tokens, max(used, known) * prefix.granule_tokens, last_used)

    def holders(self, prefix: Prefix, most: int) -> list[str]:
        """Up to `most` replicas that have some of the prompt, those that have more of it first."""
        found: dict[str, None] = {}
        for granule in reversed(prefix.hashes[: _leading(prefix.hashes, self._holders)]):
            found.update(dict.fromkeys(self._holders.get(granule, ())))
            if len(found) >= most:
                break
        return list(found)[:most]

    def used(self, replica_id: str) -> Container[int]:
        """The granules that the replica's running requests use, as of its last report; a view."""
        cached = self._cached.get(replica_id)
        return cached.used if cached is not None else ()

    def check_integrity(self) -> None:
        """Raise AssertionError when the two directions differ."""
        fresh: dict[int, set[str]] = {}
        for replica_id, cached in self._cached.items():
            assert cached.used <= cached.all, f"replica {replica_id} uses granules that it doesn't have"
            for granule in cached.all:
                fresh.setdefault(granule, set()).add(replica_id)
        assert fresh == {key: set(ids) for key, ids in self._holders.items()}, "granules and their replicas differ"

    def _drop(self, granule: int, replica_id: str) -> None:
        left = tuple(other for other in self._holders[granule] if other != replica_id)
        if left:
            self._holders[granule] = left
        else:
            del self._holders[granule]


def _leading(hashes: Sequence[int], known: Container[int]) -> int:
    """How many leading hashes are known, where a known one has all before it known."""
    return bisect_left(hashes, True, key=lambda granule: granule not in known)
