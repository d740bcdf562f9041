"""Everything that can be known to be wrong before Ray starts, cheapest first; each finding is one line."""

from __future__ import annotations

import os
import platform
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from deployments import store, survey
from deployments.api.auth import open_gate
from deployments.config_file import ConfigFile
from deployments.errors import ConfigError
from deployments.survey import Survey
from placement import probe
from placement.hardware import format_bytes

SUPPORTED = ((3, 11), (3, 12))

SERVICE_BYTES = 1_400_000_000
"""Main memory of Ray's and Serve's own processes, the ledgers and one ingress replica (measured: 1.6 GB resident,
pages that they share counted in each)."""
REPLICA_BYTES = 700_000_000
"""Main memory of a replica's two processes without weights, reserve and KV cache: mostly torch and its imports."""


@dataclass(frozen=True, slots=True)
class Ready:
    """What preflight found out and held on to."""

    survey: Survey
    port_claim: socket.socket
    """Keeps other Headrooms off the port until it is closed."""


def check(file: ConfigFile, home: Path, environ: Mapping[str, str], progress: store.Progress) -> Ready:
    """Check interpreter, port, state folder, keys, models, plans and resources, and fetch what is missing.

    Raises:
        ConfigError: the first thing that would keep the service from running.
    """
    check_interpreter(sys.version_info[:2], platform.system())
    claim = claim_port(file.config.http_options.host, file.config.http_options.port)
    try:
        check_writable(home)
        settings = file.config.application.args
        open_gate(settings.api, environ)
        models = []
        for model in settings.models:
            progress(f"model {model.name}: source {model.source}")
            local = store.fetch(model.source, revision=model.revision, home=home, progress=progress)
            models.append((model, local))
        progress("planning")
        found = survey.take(models)
        check_resources(found, cpus=probe.cpu_cores(), memory=probe.available_memory())
    except BaseException:
        claim.close()
        raise
    return Ready(found, claim)


def check_interpreter(version: tuple[int, int], system: str) -> None:
    """Python 3.11 or 3.12 on Linux.

    Raises:
        ConfigError: another.
    """
    if version not in SUPPORTED:
        raise ConfigError(f"Python 3.11 or 3.12 is needed, this is {version[0]}.{version[1]}; set PYTHON= for make")
    if system != "Linux":
        raise ConfigError(f"Linux is needed, this is {system}; use a container or a virtual machine")


def claim_port(host: str, port: int) -> socket.socket:
    """Check that the port is free, and claim it among Headrooms until the returned socket is closed.

    The claim is an abstract Unix socket named after the port: it lives in the same network namespace as the port, and
    ends with the process.

    Raises:
        ConfigError: the port is taken or claimed, or the host is not this machine's.
    """
    check_port(host, port)
    claim = socket.socket(socket.AF_UNIX)
    try:
        claim.bind(f"\0headroom-port-{port}")
    except OSError:
        claim.close()
        raise ConfigError(f"another Headroom is starting on port {port}; choose another with --port") from None
    return claim


def check_port(host: str, port: int) -> None:
    """The port can be bound by one who does not share it.

    Serve's proxies bind with SO_REUSEPORT, under which two servers silently share a port and answers mix. Without it a
    bind fails when anyone listens; SO_REUSEADDR lets only the remains of closed connections pass.

    Raises:
        ConfigError: the port is taken, or the host is not this machine's.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as plain:
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            plain.bind(address)
            plain.listen()
    except socket.gaierror as error:
        raise ConfigError(f"http_options.host {host!r} is not an address: {error.strerror}") from None
    except OSError as error:
        raise ConfigError(
            f"port {port} on {host} can't be had ({os.strerror(error.errno or 0)}); stop what uses it, or choose "
            "another with --port or http_options.port"
        ) from None


def check_writable(home: Path) -> None:
    """The state folder exists and takes files.

    Raises:
        ConfigError: it doesn't.
    """
    probe_file = home / f".writable-{os.getpid()}"
    try:
        home.mkdir(parents=True, exist_ok=True)
        probe_file.touch()
        probe_file.unlink()
    except OSError as error:
        raise ConfigError(f"state folder {home} is not writable ({error.strerror}); set HEADROOM_HOME") from None


def check_resources(found: Survey, *, cpus: int, memory: int) -> None:
    """All replicas together have the GPUs, the CPUs they ask for, and the main memory.

    Args:
        found: the plans.
        cpus: cores of this machine.
        memory: bytes of main memory that can be taken.

    Raises:
        ConfigError: what is short, by how much, and which setting to change.
    """
    gpus = sum(pool.gpus for pool in found.pools)
    if gpus > found.visible_gpus:
        raise ConfigError(
            f"the replicas need {gpus} GPUs in all, {found.visible_gpus} are visible; lower `replicas` (or "
            "`max_replicas`) or `stages`, or set `device: cpu` for a pool"
        )
    asked = sum(pool.pool.most_replicas * (pool.pool.cpus or 0) for pool in found.pools)
    if asked > cpus:
        raise ConfigError(f"the replicas ask for {asked:g} CPUs, there are {cpus}; lower or remove `cpus`")
    replicas = sum(pool.pool.most_replicas for pool in found.pools)
    need = SERVICE_BYTES + replicas * REPLICA_BYTES + sum(pool.cpu_bytes for pool in found.pools)
    if need > memory:
        raise ConfigError(
            f"{replicas} replicas need {format_bytes(need)} of memory in all, {format_bytes(memory)} are available; "
            "lower `replicas` (or `max_replicas`), `cpu_device_memory` or `max_memory`"
        )
