"""Waiting for what other processes and tasks do: generous limits, as the machine may be busy."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import psutil


async def until(holds: Callable[[], bool], limit_s: float = 60.0) -> None:
    """Return once `holds`, while other tasks run; fail the test at the limit."""
    deadline = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline, f"still not so after {limit_s} s"
        await asyncio.sleep(0.005)


def wait_for(holds: Callable[[], bool], limit_s: float) -> float:
    """Seconds until `holds`, in a test without an event loop; fail the test at the limit."""
    begun = time.monotonic()
    while not holds():
        assert time.monotonic() - begun < limit_s, f"{holds} did not hold within {limit_s} s"
        time.sleep(0.05)
    return time.monotonic() - begun


def gone(pid: int | None) -> bool:
    """Whether a process has ended, reaped or not."""
    assert pid is not None
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
