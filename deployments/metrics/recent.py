"""How fast a counter has grown lately. Time comes from the caller."""

from __future__ import annotations

from collections import deque

WINDOW_S = 5.0


class RecentRate:
    """Per second, over the last `WINDOW_S` seconds for which the counter was told."""

    def __init__(self) -> None:
        self._told: deque[tuple[float, int]] = deque()
        """(instant, count), oldest first."""

    def add(self, count: int, now: float) -> None:
        """The counter's value now; a lower one than before is another counter's."""
        if self._told and (count < self._told[-1][1] or now < self._told[-1][0]):
            self._told.clear()
        self._told.append((now, count))
        while len(self._told) > 2 and self._told[1][0] <= now - WINDOW_S:
            self._told.popleft()

    def per_s(self, now: float) -> float | None:
        """None where it was told less than twice, or not for `WINDOW_S` seconds."""
        if not self._told or now - self._told[-1][0] > WINDOW_S:
            return None
        (first, before), (last, count) = self._told[0], self._told[-1]
        return (count - before) / (last - first) if last > first else None
