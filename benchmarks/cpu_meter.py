"""CPU time of the clients and of each part of the service under a load: which process is the bottleneck."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import psutil

from benchmarks.live.memory import role_of


@dataclass(frozen=True, slots=True)
class Part:
    """The processes of one role under a load."""

    role: str
    processes: int
    per_request_s: float
    """CPU seconds of all of them."""
    busiest: float
    """CPU seconds per second of the one that used the most. What runs in Python has hardly more than 1."""


class CpuMeter:
    """Adds up what processes of this machine use during `over`.

    Args:
        clients: pids of the clients' processes.
        service: pid of `headroom serve`, whose descendants are the service; None where it is not known.
    """

    def __init__(self, clients: Sequence[int], service: int | None) -> None:
        self._clients = [psutil.Process(pid) for pid in clients]
        self._service = None if service is None else psutil.Process(service)
        self._spent: Counter[tuple[str, int]] = Counter()
        """CPU seconds by role and pid."""
        self._seconds, self._requests = 0.0, 0

    @contextmanager
    def over(self, requests: int) -> Iterator[None]:
        """Count what is used in here, where so many requests are served."""
        before, begun = self._read(), time.perf_counter()
        yield
        self._seconds += time.perf_counter() - begun
        self._requests += requests
        for pid, (role, seconds) in self._read().items():  # a process may have another role than before
            self._spent[role, pid] += seconds - before.get(pid, (role, 0.0))[1]

    def parts(self) -> tuple[Part, ...]:
        """By role, those that used the most first; none where nothing was counted."""
        by_role: dict[str, list[float]] = {}
        for (role, _), seconds in self._spent.items():
            by_role.setdefault(role, []).append(seconds)
        parts = [
            Part(role, len(its), sum(its) / self._requests, max(its) / self._seconds) for role, its in by_role.items()
        ]
        return tuple(sorted(parts, key=lambda part: part.per_request_s, reverse=True))

    def _read(self) -> dict[int, tuple[str, float]]:
        """Role and CPU seconds of each process so far, by pid."""
        service = [self._service, *self._service.children(recursive=True)] if self._service else []
        found: dict[int, tuple[str, float]] = {}
        for process in (*self._clients, *service):
            with suppress(psutil.Error):  # It ended meanwhile.
                role = "clients" if process in self._clients else role_of(process.cmdline()) or process.name()
                times = process.cpu_times()
                found[process.pid] = role, times.user + times.system
        return found
