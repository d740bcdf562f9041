"""What is served live, and by what rules. Imports no Ray, which reads its settings when it is first imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from benchmarks.routing.fleet import UNIT, ReplicaSpec

Routing = Literal["grants", "serve"]
MODEL = "paced"
INGRESSES = 2
POOLS: dict[str, tuple[ReplicaSpec, ...]] = {
    "small": (ReplicaSpec(UNIT), ReplicaSpec(UNIT)),
    "large": (ReplicaSpec(4 * UNIT),),
}
FLEET = tuple(spec for specs in POOLS.values() for spec in specs)
CONTEXT = UNIT
"""What fits every replica, so that no request is refused for its length by one routing alone."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What all replicas of one run are told. Wall-clock seconds."""

    slow: float
    """Wall-clock seconds of one simulated second."""
    queue_limit: int
    """Requests that may wait; here where there is no ledger, else there."""
    wait_limit_s: float
