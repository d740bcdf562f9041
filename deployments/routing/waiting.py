"""The queue of requests that wait for blocks: fair between tenants, by priority and arrival within one, with deadlines.

The order of all who wait is (tag of the tenant, priority, arrival), and so it is among those that lost the replica they
were granted: these come first, and their tenants have paid for them. They stand in lines of requests that are alike: of
one pool, and alike in size up to a factor of two. When there is no room for the first of a line, there is hardly any
for the rest of it, so only the first of each line is looked at: some tens of them, however many wait.
"""

from __future__ import annotations

import heapq
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from deployments.protocol import ReserveRequest
from deployments.routing.fairness import FairShares
from deployments.routing.growth import Waiting
from deployments.routing.policy import Size

Place = tuple[bool, int, int, int]
"""(whether it has lost no replica, tag of the tenant, priority, arrival): the lowest is served first."""


class Kind(NamedTuple):
    """What the requests of one line have in common."""

    pool: str | None
    grant_bits: int
    """Bit length of the grant in tokens."""
    longest_bits: int
    """Bit length of prompt + max_tokens."""
    resumes: bool = False
    """They lost the replica they were granted."""


@dataclass(slots=True)
class Sum:
    """Over the waiters of one kind."""

    requests: int = 0
    tokens: int = 0
    """Of their grants."""
    longest: int = 0
    """The longest of all that joined since there was none."""
    least_room: int = sys.maxsize
    """The least of the same."""


@dataclass(slots=True, eq=False)
class Waiter:
    """One waiting request."""

    request: ReserveRequest
    size: Size
    """As it was when it joined."""
    joined_at: float
    deadline: float
    forecast_ms: int = 0
    """How long it was expected to wait."""
    arrival: int = 0
    """Its number among all that ever joined; set by the queue."""
    waits: bool = False
    """Whether it is in the queue; set by the queue."""
    passed_tokens: int = 0
    """Tokens granted to requests behind it while it stood first in its line."""
    judged: int = -1
    """How often replicas had come or gone when it was last found that one could hold it; set by `Turns`."""
    least_room: int = field(init=False)
    """Tokens that may do for it: with a prefix it may need fewer than its size says, and at least one."""
    kind: Kind = field(init=False)
    """Its line."""

    def __post_init__(self) -> None:
        size = self.size
        self.least_room = size.grant_tokens if self.request.prefix is None else 1
        longest = size.prompt_tokens + size.max_tokens
        bits = size.grant_tokens.bit_length(), longest.bit_length()
        self.kind = Kind(self.request.pool, *bits, self.request.resumes)


class Line:
    """The waiters of one kind. Its first costs O(log n), after however many grants in other lines.

    Args:
        shares: where tenants stand.
        fresh: whether its waiters have lost no replica.
    """

    def __init__(self, shares: FairShares, *, fresh: bool) -> None:
        self._shares = shares
        self._fresh = fresh
        self._of_tenant: dict[str, list[tuple[int, int, Waiter]]] = {}
        """Tenant -> heap of (priority, arrival, waiter)."""
        self._firsts: list[tuple[Place, str]] = []
        """A heap with one valid entry per tenant. Tags only grow and leaving only makes the first a later one, so an
        entry is never too late: it is corrected when it comes up."""
        self._entry: dict[str, Place] = {}
        """Tenant -> its valid entry."""
        self._found: tuple[Place, Waiter] | None = None
        """The first, when it was last looked for; None when someone has joined since who may come before."""

    def join(self, waiter: Waiter) -> None:
        """Add a waiter."""
        request = waiter.request
        heap = self._of_tenant.setdefault(request.tenant, [])
        heapq.heappush(heap, (request.priority, waiter.arrival, waiter))
        if heap[0][2] is waiter:
            self._enter(request.tenant)

    def first(self) -> tuple[Place, Waiter] | None:
        """Who is next of those that still wait; None when nobody does."""
        found = self._found
        if found is None or not found[1].waits or self._shares.tag(found[1].request.tenant) != found[0][1]:
            found = self._found = self._seek()
        return found

    def _seek(self) -> tuple[Place, Waiter] | None:
        while self._firsts:
            place, tenant = self._firsts[0]
            if self._entry.get(tenant) != place:
                heapq.heappop(self._firsts)
                continue
            heap = self._of_tenant[tenant]
            while heap and not heap[0][2].waits:
                heapq.heappop(heap)
            if not heap:
                heapq.heappop(self._firsts)
                del self._of_tenant[tenant], self._entry[tenant]
            elif place == (now := self._place(tenant)):
                return place, heap[0][2]
            else:
                self._entry[tenant] = now
                heapq.heapreplace(self._firsts, (now, tenant))
        return None

    def _enter(self, tenant: str) -> None:
        place = self._place(tenant)
        if self._entry.get(tenant) != place:
            self._entry[tenant] = place
            self._found = None
            heapq.heappush(self._firsts, (place, tenant))

    def _place(self, tenant: str) -> Place:
        priority, arrival, _ = self._of_tenant[tenant][0]
        return self._fresh, self._shares.tag(tenant), priority, arrival


class WaitingQueue:
    """All waiters of one ledger. Removal anywhere and the next deadline cost O(log n).

    Args:
        shares: where tenants stand; new and empty.
    """

    def __init__(self, shares: FairShares) -> None:
        self._shares = shares
        self._waiters: dict[str, Waiter] = {}
        self._lines: dict[Kind, Line] = {}
        self._deadlines: list[tuple[float, int, Waiter]] = []
        """A heap; entries of waiters that left are skipped, and swept when they are the majority."""
        self._joined = 0
        self._tokens = 0
        self._paid_tokens = 0
        """Of the same, those of requests that resume."""
        self._sums: dict[Kind, Sum] = {}
        self.least_room = sys.maxsize
        """With less room than so many tokens none of the waiters is served."""

    def __len__(self) -> int:
        return len(self._waiters)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._waiters

    @property
    def tokens(self) -> int:
        """Sum of the waiters' grant sizes."""
        return self._tokens

    def sums(self) -> list[Waiting]:
        """What waits, by kind: some tens, however many wait."""
        return [Waiting(kind.pool, each.longest, each.tokens) for kind, each in self._sums.items()]

    def by_pool(self) -> tuple[tuple[str | None, int], ...]:
        """(pool that they insist on, waiters), None for any pool. Looks at every waiter: for snapshots."""
        return tuple(Counter(waiter.request.pool for waiter in self._waiters.values()).items())

    def tokens_before(self, request: ReserveRequest) -> int:
        """Tokens likely to be granted before this request, which doesn't wait yet or is its tenant's last."""
        if request.resumes:
            return self._paid_tokens
        fresh = self._tokens - self._paid_tokens
        return self._paid_tokens + self._shares.tokens_before(request.tenant, request.weight, fresh)

    def join(self, waiter: Waiter) -> None:
        """Add a waiter; its request id must not wait already."""
        request = waiter.request
        if request.request_id in self._waiters:
            raise ValueError(f"request {request.request_id} waits already")
        self._waiters[request.request_id] = waiter
        waiter.waits = True
        self._joined += 1
        waiter.arrival = self._joined
        self._add(waiter)
        self._shares.join(request.tenant, _to_pay(waiter), request.weight)
        self._line_up(waiter)
        heapq.heappush(self._deadlines, (waiter.deadline, waiter.arrival, waiter))

    def is_first(self, waiter: Waiter) -> bool:
        """Whether a waiter is the first of its line."""
        first = self._lines[waiter.kind].first()
        return first is not None and first[1] is waiter

    def firsts(self) -> list[Waiter]:
        """The first of each line, in the order in which it is their turn."""
        found: list[tuple[Place, Waiter]] = []
        for kind, line in list(self._lines.items()):
            first = line.first()
            if first is None:
                del self._lines[kind]
            else:
                found.append(first)
        found.sort()  # no two places are the same
        return [waiter for _, waiter in found]

    def leave(self, request_id: str, *, granted_tokens: int = 0) -> Waiter | None:
        """Take a waiter out; None when it doesn't wait.

        Args:
            request_id: of the waiter.
            granted_tokens: what its tenant is charged for, unless it resumes.
        """
        waiter = self._waiters.get(request_id)
        if waiter is None:
            return None
        tenant = waiter.request.tenant
        if granted_tokens and not waiter.request.resumes:
            self._shares.charge(tenant, granted_tokens)
        del self._waiters[request_id]
        waiter.waits = False
        self._subtract(waiter)
        self._shares.leave(tenant, _to_pay(waiter))
        self._sweep()
        return waiter

    def displaced_by(self, request: ReserveRequest, limit: int) -> Waiter | None:
        """Who is to leave a full queue for a newcomer whose tenant waits with less than its share of it.

        Looks at every waiter, if so: for a queue that one tenant has filled.

        Args:
            request: the newcomer.
            limit: requests that may wait.

        Returns:
            The last one, of those that don't resume, of the tenant most over its share that has any; None when the
            newcomer is the one to refuse.
        """
        if not self._shares.below_share(request.tenant, request.weight, limit):
            return None
        tenant = self._shares.most_over_share(request.tenant, request.weight, limit)
        if tenant is None:
            return None
        own = (each for each in self._waiters.values() if each.request.tenant == tenant and not each.request.resumes)
        return max(own, key=lambda waiter: (waiter.request.priority, waiter.arrival), default=None)

    def overdue(self, now: float) -> Waiter | None:
        """A waiter whose deadline has passed, the earliest deadline first."""
        while self._deadlines and self._deadlines[0][0] <= now:
            if self._deadlines[0][2].waits:
                return self._deadlines[0][2]
            heapq.heappop(self._deadlines)
        return None

    def of_ingress(self, ingress_id: str) -> list[str]:
        """Request ids that one ingress has waiting, oldest first. Looks at every waiter: for rare events."""
        return [key for key, waiter in self._waiters.items() if waiter.request.ingress_id == ingress_id]

    def count(self, chosen: Callable[[Waiter], bool]) -> int:
        """How many are such. Looks at every waiter: for checks."""
        return sum(map(chosen, self._waiters.values()))

    def check_integrity(self) -> None:
        """Raise AssertionError when the sums or the deadlines don't match the waiters."""
        self._shares.check_integrity()
        total = sum(waiter.size.grant_tokens for waiter in self._waiters.values())
        assert total == self._tokens, f"waiting tokens: counted {self._tokens}, summed {total}"
        by_kind = sum(each.tokens for each in self._sums.values()), sum(each.requests for each in self._sums.values())
        paid = sum(each.tokens for kind, each in self._sums.items() if kind.resumes)
        assert paid == self._paid_tokens, f"waiting tokens of those that resume: counted {self._paid_tokens}, {paid}"
        assert by_kind == (total, len(self)), f"waiting (tokens, requests) by kind: {by_kind}, all: {total, len(self)}"
        with_deadline = {id(entry[2]) for entry in self._deadlines}
        lost = [key for key, waiter in self._waiters.items() if id(waiter) not in with_deadline]
        assert not lost, f"waiters without a deadline: {lost}"
        least = min((waiter.least_room for waiter in self._waiters.values()), default=sys.maxsize)
        assert self.least_room <= least, f"a waiter needs {least} tokens of room at least, not {self.least_room}"

    def _add(self, waiter: Waiter) -> None:
        size, each = waiter.size, self._sums.setdefault(waiter.kind, Sum())
        self._tokens += size.grant_tokens
        self._paid_tokens += size.grant_tokens - _to_pay(waiter)
        each.requests += 1
        each.tokens += size.grant_tokens
        each.longest = max(each.longest, size.prompt_tokens + size.max_tokens)
        each.least_room = min(each.least_room, waiter.least_room)
        self.least_room = min(self.least_room, waiter.least_room)

    def _subtract(self, waiter: Waiter) -> None:
        each, tokens = self._sums[waiter.kind], waiter.size.grant_tokens
        self._tokens -= tokens
        self._paid_tokens -= tokens - _to_pay(waiter)
        each.requests -= 1
        each.tokens -= tokens
        if not each.requests:
            del self._sums[waiter.kind]
            self.least_room = min((each.least_room for each in self._sums.values()), default=sys.maxsize)

    def _line_up(self, waiter: Waiter) -> None:
        kind = waiter.kind
        if kind not in self._lines:
            self._lines[kind] = Line(self._shares, fresh=not kind.resumes)
        self._lines[kind].join(waiter)

    def _sweep(self) -> None:
        """Forget those that left and were never come upon, so that memory follows those who wait."""
        if not self._waiters:
            self._lines.clear()
            self._deadlines.clear()
        elif len(self._deadlines) > 64 and len(self._deadlines) > 2 * len(self._waiters):
            self._deadlines = [entry for entry in self._deadlines if entry[2].waits]
            heapq.heapify(self._deadlines)
            self._lines.clear()
            for waiter in self._waiters.values():
                self._line_up(waiter)


def _to_pay(waiter: Waiter) -> int:
    """Tokens that its tenant will be charged for its grant: none for one that was granted, and lost that replica."""
    return 0 if waiter.request.resumes else waiter.size.grant_tokens
