"""Whose turn it is: start-time fair queueing over granted KV tokens, with weights. Integers only.

Each tenant that waits has a tag, its virtual time: the tenant with the lowest tag is served next, and a grant moves
its tag on by `granted tokens / weight`. So two tenants that both keep waiting are granted tokens in proportion to their
weights, up to one request's size each, whatever number of requests either of them has waiting.

A tenant that starts to wait begins at the clock, or where it stood if it was served beyond that: being away earns
nothing and costs nothing. The clock follows the tags served and, with every grant, moves on by `granted tokens /
weight of all who wait`. Without that second part it would stand still while ever new tenants are served once each, all
of them before a tenant that was served once already.

Start-time fair queueing: Goyal, Vin and Cheng, SIGCOMM 1996. Tags belong to tenants rather than to requests, so that
requests which leave without having been served cost their tenant nothing.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping

UNIT = 1 << 20
"""Virtual time of one token at weight 1; finer than the largest weight, so that every grant counts."""


class Flow:
    """One tenant that waits, or that was served beyond the clock."""

    __slots__ = ("listed", "requests", "tag", "tokens", "weight")

    def __init__(self, tag: int, weight: int) -> None:
        self.tag = tag
        self.weight = weight
        self.requests = 0
        """Requests of it that wait."""
        self.tokens = 0
        """Of their grants, what it will be charged for."""
        self.listed = -1
        """The tag that it was last listed with among those ahead of the clock."""


class FairShares:
    """The tags of all tenants.

    Args:
        weights: tenant -> weight, at least 1, of tenants whose requests name none; 1 for those not named here either.
    """

    def __init__(self, weights: Mapping[str, int]) -> None:
        self._weights = dict(weights)
        self._flows: dict[str, Flow] = {}
        self._ahead: list[tuple[int, str]] = []
        """A heap of (tag, tenant) of tenants that wait for nothing, until the clock has reached them."""
        self._clock = 0
        self._waiting_weight = 0
        self._requests = 0

    def join(self, tenant: str, tokens: int, weight: int | None = None) -> None:
        """A request of this tenant begins to wait; its weight is the tenant's until the next one brings another.

        Args:
            tenant: whose.
            tokens: what it is to be charged for once it is granted; 0 for a request that was paid for before.
            weight: that comes with the request.
        """
        own = self._weight(tenant, weight)
        flow = self._flows.get(tenant)
        if flow is None:
            flow = self._flows[tenant] = Flow(self._clock, own)
        self._waiting_weight += own - (flow.weight if flow.requests else 0)
        flow.weight = own
        if flow.requests == 0:
            flow.tag = max(flow.tag, self._clock)
        flow.requests += 1
        flow.tokens += tokens
        self._requests += 1

    def leave(self, tenant: str, tokens: int) -> None:
        """A request of this tenant waits no longer. When nobody waits any more all are equal again."""
        flow = self._flows[tenant]
        flow.requests -= 1
        flow.tokens -= tokens
        self._requests -= 1
        if flow.requests == 0:
            self._waiting_weight -= flow.weight
            if flow.tag <= self._clock:
                del self._flows[tenant]
            elif flow.listed != flow.tag:
                flow.listed = flow.tag
                heapq.heappush(self._ahead, (flow.tag, tenant))
        if self._requests == 0:
            self._flows.clear()
            self._ahead.clear()
            self._clock = 0

    def charge(self, tenant: str, tokens: int) -> None:
        """A request of this tenant, which waits still, was granted so many tokens."""
        flow = self._flows[tenant]
        self._clock = max(self._clock + tokens * UNIT // self._waiting_weight, flow.tag)
        flow.tag += tokens * UNIT // flow.weight
        while self._ahead and self._ahead[0][0] <= self._clock:
            tag, other = heapq.heappop(self._ahead)
            known = self._flows.get(other)
            if known is not None and known.requests == 0 and known.tag == tag:
                del self._flows[other]

    def tag(self, tenant: str) -> int:
        """Virtual time of a tenant that waits."""
        return self._flows[tenant].tag

    def tokens_before(self, tenant: str, weight: int | None, total: int) -> int:
        """Tokens likely to be granted before one more request of this tenant, when `total` wait to be charged for.

        While it works off its own, each of the others is granted in proportion to its weight, and no more than `total`.
        """
        flow = self._flows.get(tenant)
        tokens = flow.tokens if flow is not None else 0
        own = self._weight(tenant, weight)
        return min(total, -(-tokens * self._everyone(tenant, own) // own))

    def below_share(self, tenant: str, weight: int | None, limit: int) -> bool:
        """Whether a tenant waits with fewer requests than its part of `limit`, by weight among all who wait and itself.

        Args:
            tenant: who would wait with one request more.
            weight: that comes with the request.
            limit: requests that may wait at once.
        """
        flow = self._flows.get(tenant)
        requests = flow.requests if flow is not None else 0
        own = self._weight(tenant, weight)
        return requests < _share(limit, own, self._everyone(tenant, own))

    def most_over_share(self, newcomer: str, weight: int | None, limit: int) -> str | None:
        """The tenant that waits with the most requests over its part of `limit` when `newcomer` waits too.

        Only of tenants that wait with something to be charged for: what was paid for before makes no room.

        Returns:
            None when none of them has more than its part. Looks at every tenant that waits.
        """
        everyone = self._everyone(newcomer, self._weight(newcomer, weight))
        over = {
            tenant: flow.requests - _share(limit, flow.weight, everyone)
            for tenant, flow in self._flows.items()
            if tenant != newcomer and flow.tokens
        }
        most = max(over, key=over.__getitem__, default=None)
        return most if most is not None and over[most] > 0 else None

    def _weight(self, tenant: str, named: int | None) -> int:
        """A tenant's weight, by the request that names it or by the settings."""
        return self._weights.get(tenant, 1) if named is None else named

    def _everyone(self, tenant: str, weight: int) -> int:
        """The weights of all who wait, and of this tenant."""
        flow = self._flows.get(tenant)
        return self._waiting_weight + weight - (flow.weight if flow is not None and flow.requests else 0)

    def check_integrity(self) -> None:
        """Raise AssertionError when a sum differs from a fresh one."""
        waiting = [flow for flow in self._flows.values() if flow.requests]
        assert sum(flow.weight for flow in waiting) == self._waiting_weight, "weights of those who wait"
        assert sum(flow.requests for flow in waiting) == self._requests, "requests of all tenants"
        away = {tenant for tenant, flow in self._flows.items() if not flow.requests}
        assert away <= {tenant for _, tenant in self._ahead}, "a tenant that is away would never be forgotten"


def _share(limit: int, weight: int, everyone: int) -> int:
    """Requests of `limit` that are a tenant's by its weight, one at least."""
    return max(1, limit * weight // everyone)
