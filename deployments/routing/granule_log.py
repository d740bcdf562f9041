"""A replica's side of prefix affinity: which granules it has cached, and what of that the ledger must yet be told.

A change is in every report until one that had it is acknowledged, as the newest state of its granule. So reports may be
lost or late without harm: a ledger that drops a late one has had all of it in the later one. A ledger that is new, or
that may have forgotten this replica, is told everything.
"""

from __future__ import annotations

from deployments.protocol import NO_CHANGE, CachedGranules

MOST_OWED = 1000
"""Changes that may be owed beyond twice what is cached."""


class GranuleLog:
    """The granules of one replica, and the changes that are owed."""

    def __init__(self) -> None:
        self._used: dict[int, bool] = {}
        """Cached granule -> whether a running request uses it."""
        self._owed: dict[int, int] = {}
        """Changed granule -> sequence of the first report that had its newest state; 0 before there was one."""
        self._whole_owed: int | None = 0
        """The same for a whole report; None: none is owed."""

    def note(self, news: CachedGranules) -> bool:
        """Take in what the engine says; returns whether it was anything."""
        for granule in news.gone:
            self._used.pop(granule, None)
        self._used.update(dict.fromkeys(news.used, True))
        self._used.update(dict.fromkeys(news.idle, False))
        changed = (*news.used, *news.idle, *news.gone)
        self._owed.update(dict.fromkeys(changed, 0))
        if (
            len(self._owed) > 2 * len(self._used) + MOST_OWED
        ):  # The ledger has been away for long: the whole is shorter.
            self.owe_all()
        return bool(changed)

    def owe_all(self) -> None:
        """The ledger may know nothing."""
        self._whole_owed = 0
        self._owed.clear()

    def report(self, sequence: int) -> CachedGranules:
        """What the report of this sequence says."""
        self._owed = {granule: first or sequence for granule, first in self._owed.items()}
        if self._whole_owed is not None:
            self._whole_owed = self._whole_owed or sequence
            return self._sorted(whole=True)
        return self._sorted(whole=False) if self._owed else NO_CHANGE

    def acknowledge(self, sequence: int) -> None:
        """The ledger had the report of this sequence, or a later one."""
        self._owed = {granule: first for granule, first in self._owed.items() if not 0 < first <= sequence}
        if self._whole_owed is not None and 0 < self._whole_owed <= sequence:
            self._whole_owed = None

    def _sorted(self, *, whole: bool) -> CachedGranules:
        named = self._used if whole else self._owed
        used = tuple(granule for granule in named if self._used.get(granule) is True)
        idle = tuple(granule for granule in named if self._used.get(granule) is False)
        return CachedGranules(whole, used, idle, tuple(granule for granule in named if granule not in self._used))
