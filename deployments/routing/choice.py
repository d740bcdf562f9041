"""Which replica of a ledger's fleet a request goes to: the roomiest, or one that has its prefix, as the policy says."""

from __future__ import annotations

import random
from collections.abc import Iterator

from deployments.protocol import Prefix, ReserveRequest
from deployments.routing.account import ReplicaAccount
from deployments.routing.fleet import Fleet
from deployments.routing.policy import Size, pick
from deployments.routing.prefixes import NO_MATCH, Match, PrefixMap

MOST_HOLDERS = 16
"""Of the replicas that have a request's prefix, so many are compared with the roomiest ones, the longest matches first.
Where more of them have as much of it, the roomiest ones most likely have it too, and are credited with it."""


class Choice:
    """Compares a few candidates, so that no decision looks at the whole fleet.

    Args:
        fleet: the replicas.
        prefixes: what they have cached.
        rng: breaks ties.
    """

    def __init__(self, fleet: Fleet, prefixes: PrefixMap, rng: random.Random) -> None:
        self._fleet = fleet
        self._prefixes = prefixes
        self._rng = rng

    def best(
        self, request: ReserveRequest, size: Size, kept: ReplicaAccount | None = None
    ) -> tuple[ReplicaAccount, Match] | None:
        """The best replica where the request fits now, and what of its prompt that has cached.

        Args:
            request: names its pool, if it insists on one, and its prefix.
            size: its size.
            kept: a replica that is kept for this request, and isn't open to others.
        """
        prefix, candidates = request.prefix, self._fleet.best(size, request.pool, self._rng)
        if kept is not None:
            candidates.append(kept)
        if prefix is None:
            chosen = pick(candidates, size, self._rng)
            return None if chosen is None else (chosen, NO_MATCH)

        def match_of(account: ReplicaAccount) -> Match:
            return self._prefixes.match(prefix, account.state.replica_id)

        by_id = {account.state.replica_id: account for account in (*candidates, *self._holders(prefix, request.pool))}
        chosen = pick(by_id.values(), size, self._rng, match_of)
        return None if chosen is None else (chosen, match_of(chosen))

    def _holders(self, prefix: Prefix, pool: str | None) -> Iterator[ReplicaAccount]:
        """Open replicas of the right pool that have some of the prompt."""
        for replica_id in self._prefixes.holders(prefix, MOST_HOLDERS):
            account = self._fleet.get(replica_id)
            if account is None or not self._fleet.is_open(replica_id):
                continue
            if pool is None or account.state.pool == pool:
                yield account
