"""Where an ingress sends requests while the ledger is gone: by the ledger's last news and what it placed since. Pure.

Of two replicas drawn at random the one with more headroom is asked (Mitzenmacher, "The power of two choices in
randomized load balancing", 2001): all ingresses have the same old news, and the best by it would get everything.
What is known may be wrong, so nothing is refused here: the replica takes a request up only if it has the room itself.
"""

from __future__ import annotations

import random
from collections import Counter

from deployments.protocol import LOCAL_EPOCH, Grant, LedgerNews, ReplicaSpot, ReserveRequest
from deployments.routing.policy import Size, fits_ever, grant_blocks

TTL_S = 10.0
"""How long a replica takes a local grant up."""


class LocalPlacement:
    """One ingress's knowledge of the replicas, for when it must do without the ledger.

    Args:
        ingress_id: makes the grants' ids unique among the ingresses.
        rng: draws the two.
    """

    def __init__(self, ingress_id: str, rng: random.Random) -> None:
        self._ingress_id = ingress_id
        self._rng = rng
        self._spots: dict[str, ReplicaSpot] = {}
        self._expected_output = 0
        self._placed: dict[str, Grant] = {}
        """By id, of those placed since the last news and not ended."""
        self._charged: Counter[str] = Counter()
        """Their blocks by replica."""
        self._requests: Counter[str] = Counter()
        """Their number by replica."""
        self._granted = 0

    @property
    def knows_a_replica(self) -> bool:
        """Whether there is any replica to send to."""
        return bool(self._spots)

    def hear(self, news: LedgerNews) -> None:
        """Take in what the ledger says. A new one that waits for its replicas knows less than is known here."""
        if not news.warming:
            self._spots = {spot.replica_id: spot for spot in news.spots}
            self._expected_output = news.expected_output_tokens
            self._placed.clear()  # the replicas have reported them, or will: they are in the next news
            self._charged.clear()
            self._requests.clear()

    def place(self, request: ReserveRequest, now: float) -> Grant | None:
        """A grant that the replica may refuse; None when no known replica could ever hold the request."""
        size = self._size(request)
        fitting = [s for s in self._spots.values() if request.pool in (None, s.pool) and fits_ever(s, size)]
        if not fitting:
            return None
        drawn = self._rng.sample(fitting, min(2, len(fitting)))
        best = max(drawn, key=lambda spot: self._left(spot, size))
        self._granted += 1
        grant = Grant(
            grant_id=f"{self._ingress_id}-{self._granted:x}",
            request_id=request.request_id,
            pool=best.pool,
            replica_id=best.replica_id,
            replica_epoch=best.epoch,
            ledger_epoch=LOCAL_EPOCH,
            blocks=grant_blocks(best, size),
            expires_at=now + TTL_S,
        )
        self._placed[grant.grant_id] = grant
        self._charged[grant.replica_id] += grant.blocks
        self._requests[grant.replica_id] += 1
        return grant

    def ended(self, grant_id: str) -> None:
        """A request placed here has ended, or was not taken up. Other grants' ids are left alone."""
        grant = self._placed.pop(grant_id, None)
        if grant is not None:
            self._charged[grant.replica_id] -= grant.blocks
            self._requests[grant.replica_id] -= 1

    def lost(self, replica_id: str) -> None:
        """Send nothing there until the ledger names it again."""
        self._spots.pop(replica_id, None)

    def _size(self, request: ReserveRequest) -> Size:
        output = max(1, min(self._expected_output, request.max_tokens))
        return Size(request.prompt_tokens, request.max_tokens, request.prompt_tokens + output)

    def _left(self, spot: ReplicaSpot, size: Size) -> int:
        """Tokens that would be free after the request, as far as is known; under 0 where it takes no more requests."""
        free = spot.headroom_blocks - self._charged[spot.replica_id]
        if spot.requests_left is not None and self._requests[spot.replica_id] >= spot.requests_left:
            free = min(0, free)
        return (free - grant_blocks(spot, size)) * spot.block_size
