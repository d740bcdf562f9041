"""Looks at all models when someone watches: once a second at most, however many watch."""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import Awaitable, Callable, Mapping

from deployments.fleet.state import FleetState, Sight, fleet_state
from deployments.metrics.board import Observation

FRESH_S = 1.0

Observe = Callable[[], Awaitable[Observation | None]]
"""What there is to show of a model; None while its ledger does not answer."""


class FleetWatch:
    """Keeps what was last seen of each model, so that a ledger that is gone leaves its last words. For one event loop.

    Args:
        models: name -> how to observe it.
        clock: seconds; only differences count.
    """

    def __init__(self, models: Mapping[str, Observe], clock: Callable[[], float] = time.monotonic) -> None:
        self._models = dict(models)
        self._clock = clock
        self._sights = [Sight(name, answers=False) for name in models]
        self._looked_at: float | None = None
        self._looking: asyncio.Task[None] | None = None

    async def state(self) -> FleetState:
        """The service, at most a second old; waits for a look that is under way."""
        if self._looking is None and (self._looked_at is None or self._clock() - self._looked_at >= FRESH_S):
            # A context of its own: Serve cancels the calls of a request whose client leaves, and others wait for these.
            context = contextvars.Context()
            self._looking = asyncio.get_running_loop().create_task(self._look(), context=context)
        if self._looking is not None:
            await asyncio.shield(self._looking)
        return fleet_state(self._sights, self._clock())

    async def _look(self) -> None:
        try:
            found = await asyncio.gather(*(observe() for observe in self._models.values()))
            now = self._clock()
            self._sights = [_newer(sight, seen, now) for sight, seen in zip(self._sights, found, strict=True)]
            self._looked_at = now
        finally:
            self._looking = None


def _newer(before: Sight, seen: Observation | None, now: float) -> Sight:
    if seen is not None:
        return Sight(before.model, True, seen, now)
    return Sight(before.model, False, before.seen, before.seen_at)
