"""How much memory the service's processes hold, by what they do, and whether it grows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import psutil

ROLES = {
    "ray::ServeReplica:headroom:ingress": "ingress",
    "ray::ServeReplica:headroom:ledger-": "ledger",
    "ray::ServeReplica:headroom:": "replica",
    "ray::ServeController": "controller",
}
"""Beginnings of process titles, longest first."""


@dataclass(frozen=True, slots=True)
class Trend:
    """A role's resident memory over a run, in bytes; the sum of its processes."""

    first: int
    last: int
    slope: float
    """Bytes per second, by least squares."""
    growth: float
    """What the slope comes to over the time that was looked at, as a share of the mean."""


def role_of(words: Sequence[str]) -> str | None:
    """What a process of the service does, by its command line; None for those that are Ray's alone."""
    if "deployments.engine.process" in words:
        return "engine"
    if words and words[0].rsplit("/", 1)[-1] == "haproxy":
        return "haproxy"
    title = words[0] if words else ""
    return next((role for start, role in ROLES.items() if title.startswith(start)), None)


@dataclass(frozen=True, slots=True)
class Resident:
    """One process of the service."""

    role: str
    pid: int
    bytes: int


def resident(processes: Iterable[psutil.Process]) -> list[Resident]:
    """Those that have a role; one that ends meanwhile is not counted."""
    found = []
    for process in processes:
        try:
            role = role_of(process.cmdline())
            if role is not None:
                found.append(Resident(role, process.pid, process.memory_info().rss))
        except psutil.Error:
            continue
    return found


def trend(samples: Sequence[tuple[float, int]]) -> Trend:
    """Of (seconds, bytes), in order; at least two at different times.

    Raises:
        ValueError: there are fewer.
    """
    times, values = [t for t, _ in samples], [v for _, v in samples]
    if len(set(times)) < 2:
        raise ValueError(f"a trend needs two samples at different times, there are {len(samples)}")
    middle, mean = sum(times) / len(times), sum(values) / len(values)
    spread = sum((t - middle) ** 2 for t in times)
    slope = sum((t - middle) * (v - mean) for t, v in samples) / spread
    return Trend(values[0], values[-1], slope, slope * (times[-1] - times[0]) / mean)
