"""Preflight's checks, each with what it says."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from deployments import preflight
from deployments.errors import ConfigError
from deployments.settings import AutoscalingSettings, PoolSettings
from deployments.survey import PlannedPool, Survey
from placement.hardware import Gpu
from placement.plan import Plan, Stage

GB = 10**9


def planned(replicas: int, device: str = "cpu", cpus: float | None = None) -> Survey:
    """A pool whose replicas each hold 1 GB of weights and 1 GB of KV (9 blocks and the scratch block of 0.1 GB)."""
    gpu = Gpu("d", 4 * GB, device_type="cuda" if device == "cuda" else "cpu")
    stage = Stage(0, gpu, (0, 1), ("m.layers.0",), (), GB, (), GB // 10, 4 * GB)
    plan = Plan("m", "nf4", False, "float32", "float32", 16, 9, 64, (stage,))
    pool = PoolSettings(replicas=replicas, cpus=cpus)
    return Survey((PlannedPool("m", pool, plan),), visible_gpus=2, folders={})


def test_interpreter_and_system() -> None:
    preflight.check_interpreter((3, 11), "Linux")
    preflight.check_interpreter((3, 12), "Linux")
    with pytest.raises(ConfigError, match=r"3\.11 or 3\.12 is needed, this is 3\.13"):
        preflight.check_interpreter((3, 13), "Linux")
    with pytest.raises(ConfigError, match="this is Darwin"):
        preflight.check_interpreter((3, 11), "Darwin")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_port_with_a_server_is_busy_even_if_it_shares() -> None:
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # As Serve's proxies do.
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} on 127.0.0.1 can't be had .*--port"):
            preflight.check_port("127.0.0.1", port)
        with pytest.raises(ConfigError, match=f"port {port}"):
            preflight.check_port("0.0.0.0", port)


def test_claimed_port_keeps_out_a_second_start_and_not_serve() -> None:
    port = free_port()
    with preflight.claim_port("127.0.0.1", port), socket.socket() as proxy:
        with pytest.raises(ConfigError, match=f"another Headroom is starting on port {port}"):
            preflight.claim_port("127.0.0.1", port)
        proxy.bind(("127.0.0.1", port))
    preflight.claim_port("127.0.0.1", port).close()


def test_port_can_be_had_right_after_a_server_closed_connections() -> None:
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port))
        accepted, _ = server.accept()
        accepted.close()  # The server closes first: its end stays in TIME_WAIT.
        client.close()
    preflight.check_port("127.0.0.1", port)


def test_host_that_is_none() -> None:
    with pytest.raises(ConfigError, match=r"http_options\.host"):
        preflight.check_port("no.such.host.invalid", 8000)


def test_state_folder_must_be_writable(tmp_path: Path) -> None:
    preflight.check_writable(tmp_path / "new")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="HEADROOM_HOME"):
        preflight.check_writable(tmp_path / "file" / "below")


def test_memory_counts_every_replica() -> None:
    need = preflight.SERVICE_BYTES + 2 * (preflight.REPLICA_BYTES + 2 * GB)
    preflight.check_resources(planned(2), cpus=1, memory=need)
    with pytest.raises(ConfigError, match=r"2 replicas need 6\..* GB of memory .*cpu_device_memory"):
        preflight.check_resources(planned(2), cpus=1, memory=need - 1)


def test_a_pool_that_follows_demand_counts_with_all_it_may_have() -> None:
    (fixed,) = planned(1, "cuda").pools
    pool = PoolSettings(autoscaling=AutoscalingSettings(min_replicas=0, max_replicas=3))
    survey = Survey((PlannedPool("m", pool, fixed.plan),), visible_gpus=2, folders={})
    with pytest.raises(ConfigError, match=r"need 3 GPUs in all, 2 are visible; .*max_replicas"):
        preflight.check_resources(survey, cpus=1, memory=100 * GB)


def test_gpus_count_every_replica_and_no_main_memory() -> None:
    memory = preflight.SERVICE_BYTES + 2 * preflight.REPLICA_BYTES
    preflight.check_resources(planned(2, "cuda"), cpus=1, memory=memory)
    with pytest.raises(ConfigError, match="need 3 GPUs in all, 2 are visible"):
        preflight.check_resources(planned(3, "cuda"), cpus=1, memory=10 * memory)


def test_cpus_that_ray_could_never_give() -> None:
    preflight.check_resources(planned(2, cpus=0.5), cpus=1, memory=100 * GB)
    with pytest.raises(ConfigError, match="ask for 2 CPUs, there are 1"):
        preflight.check_resources(planned(2, cpus=1), cpus=1, memory=100 * GB)
