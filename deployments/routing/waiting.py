"""The queue of requests that wait for blocks: first come, first served, each with a deadline."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from dataclasses import dataclass

from deployments.protocol import ReserveRequest


@dataclass(frozen=True, slots=True)
class Waiter:
    """One waiting request."""

    request: ReserveRequest
    deadline: float
    tokens: int
    """Size of its grant when it joined; only the forecast uses it."""


class WaitingQueue:
    """First in, first out; removal anywhere and the next deadline cost O(log n)."""

    def __init__(self) -> None:
        self._waiters: OrderedDict[str, Waiter] = OrderedDict()
        self._deadlines: list[tuple[float, int, Waiter]] = []
        """A heap; entries of waiters that left are skipped, and swept when they are the majority."""
        self._joined = 0
        self._tokens = 0

    def __len__(self) -> int:
        return len(self._waiters)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._waiters

    @property
    def tokens(self) -> int:
        """Sum of the waiters' grant sizes."""
        return self._tokens

    def join(self, waiter: Waiter) -> None:
        """Append a waiter; its request id must not wait already."""
        if waiter.request.request_id in self._waiters:
            raise ValueError(f"request {waiter.request.request_id} waits already")
        self._waiters[waiter.request.request_id] = waiter
        self._joined += 1
        self._tokens += waiter.tokens
        heapq.heappush(self._deadlines, (waiter.deadline, self._joined, waiter))

    def head(self) -> Waiter | None:
        """Who is served next, or None."""
        return next(iter(self._waiters.values()), None)

    def leave(self, request_id: str) -> Waiter | None:
        """Take a waiter out; None when it doesn't wait."""
        waiter = self._waiters.pop(request_id, None)
        if waiter is not None:
            self._tokens -= waiter.tokens
            if len(self._deadlines) > 64 and len(self._deadlines) > 2 * len(self._waiters):
                self._deadlines = [entry for entry in self._deadlines if self._waits(entry[2])]
                heapq.heapify(self._deadlines)
        return waiter

    def overdue(self, now: float) -> Waiter | None:
        """Take out one waiter whose deadline has passed, the earliest deadline first."""
        while self._deadlines and self._deadlines[0][0] <= now:
            waiter = heapq.heappop(self._deadlines)[2]
            if self._waits(waiter):
                return self.leave(waiter.request.request_id)
        return None

    def of_ingress(self, ingress_id: str) -> list[str]:
        """Request ids that one ingress has waiting, oldest first. Looks at every waiter: for rare events."""
        return [key for key, waiter in self._waiters.items() if waiter.request.ingress_id == ingress_id]

    def check_integrity(self) -> None:
        """Raise AssertionError when the sums or the deadlines don't match the waiters."""
        total = sum(waiter.tokens for waiter in self._waiters.values())
        assert total == self._tokens, f"waiting tokens: counted {self._tokens}, summed {total}"
        with_deadline = {id(entry[2]) for entry in self._deadlines}
        lost = [key for key, waiter in self._waiters.items() if id(waiter) not in with_deadline]
        assert not lost, f"waiters without a deadline: {lost}"

    def _waits(self, waiter: Waiter) -> bool:
        return self._waiters.get(waiter.request.request_id) is waiter
