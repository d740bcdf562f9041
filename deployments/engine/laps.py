"""How long the parts of something took, in the order in which they were done."""

from __future__ import annotations

import time
from collections.abc import Callable


class Laps:
    """A stopwatch; `str` of it is "read 4.1 s, settle 0.9 s"."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._last = clock()
        self.seconds: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """What was done since the lap before this one, or since the start, was `name`."""
        now = self._clock()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now

    def __str__(self) -> str:
        return ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())
