"""What an ingress knows of the lengths that its model's pools hold. Pure.

A ledger that is new knows less than the one before told, so its news count from when it has heard of the replicas.
"""

from __future__ import annotations

from deployments.protocol import LedgerNews


class Contexts:
    """Longest prompt + output, in tokens, by the ledger's news."""

    def __init__(self) -> None:
        self.longest: int | None = None
        """That a replica of any pool holds; None while the ledger has never known that of each pool."""
        self._of: dict[str, int] = {}
        """Pool -> that of its largest replica, which may be absent."""
        self._living: dict[str, int] = {}
        """Pool -> what each of its replicas holds that can take work now."""

    def hear(self, news: LedgerNews) -> None:
        """Take in the ledger's news; what it doesn't know any more is remembered."""
        if news.warming:
            return
        if news.max_context is not None:
            self.longest = news.max_context
        self._of.update(news.pool_contexts)
        self._living = dict(news.living_contexts)

    def of(self, pool: str) -> int | None:
        """That a replica of the pool holds; None while no replica of it was ever known."""
        return self._of.get(pool)

    def living(self, pool: str | None) -> int | None:
        """That each replica of some pool holds which can take work now: whatever is not longer can go to any of them.

        Args:
            pool: of this pool alone; None: the most of all pools.

        Returns:
            Tokens; where none can take work what the largest holds that is known, and None while none ever was.
        """
        for known in (self._living, self._of):
            found = [tokens for name, tokens in known.items() if pool in (None, name)]
            if found:
                return max(found)
        return None
