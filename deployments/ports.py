"""Ports for servers that start later, in processes of their own."""

from __future__ import annotations

import contextlib
import random
import socket
from pathlib import Path

_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_ABOVE_RAYS = 20_000
"""Ray gives its workers ports from 10,002 to 19,999."""


def free_ports(count: int) -> list[int]:
    """Different ports on which nothing listens, and none that the system gives to outgoing connections: Ray opens
    hundreds of these between the choice of a port and the start of its server.

    Raises:
        OSError: no such port is free.
    """
    with contextlib.ExitStack() as held:  # So that they differ.
        ports: list[int] = []
        candidates = range(_ABOVE_RAYS, _first_outgoing())
        for port in random.SystemRandom().sample(candidates, len(candidates)):
            if len(ports) == count:
                break
            server = held.enter_context(socket.socket())
            with contextlib.suppress(OSError):  # Taken.
                server.bind(("", port))
                ports.append(port)
        if len(ports) < count:
            raise OSError(f"{count} ports are needed, and {len(ports)} of {candidates} are free; stop other services")
        return ports


def _first_outgoing() -> int:
    try:
        first = int(_RANGE.read_text(encoding="ascii").split()[0])
    except OSError:
        first = 0  # Not Linux.
    return first if first > _ABOVE_RAYS + 100 else 32_768
