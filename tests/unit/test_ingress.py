"""What Serve's shutdown of an ingress replica does. The rest of it is in tests/integration."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from deployments.ingress import Ingress
from tests.unit.routing.test_dispatch import World


async def test_an_ingress_that_is_stopped_tells_the_ledgers_what_is_left() -> None:
    worlds = [World([], []) for _ in range(2)]
    for world in worlds:
        world.dispatcher._notices.unused("g")
    written: Any = Ingress.__mro__[1]  # the class as it is written; Serve's wrapper calls its `__del__`
    await written.__del__(SimpleNamespace(_dispatchers=[world.dispatcher for world in worlds]))
    assert [[notice.unused for notice in world.notices] for world in worlds] == [[("g",)], [("g",)]]
