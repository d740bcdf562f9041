"""One real service for the tests of this folder that need one: own Ray, free port, the embedded model, two replicas."""

from __future__ import annotations

import csv
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from deployments import service, store
from deployments.app import pool_deployment_name
from deployments.config_file import read_config
from deployments.home import state_folder
from deployments.local_ray import LocalRay
from deployments.metrics.board import Observation
from deployments.ports import free_ports
from deployments.processes import MARK, marked
from deployments.replica import ReplicaStatus
from deployments.routing.ledger_deployment import deployment_name
from deployments.routing.view import LedgerView
from tests.waiting import wait_for

MODEL = "smol"
START_LIMIT_S = 300.0
PROXY_COUNTS = ("status", "stot", "econ", "eresp", "wretr", "wredis", "cli_abrt", "srv_abrt", "chkfail", "chkdown")
"""Columns of HAProxy's statistics: errors of connecting and answering, retries, clients and servers that broke off."""


@dataclass(frozen=True)
class Service:
    """The running service as the tests see it: HTTP, and two looks behind it."""

    url: str
    config: Path
    """Its serve_config.yaml."""

    def actors(self, deployment: str) -> list[psutil.Process]:
        """The processes of a deployment's replicas. Ray writes the deployment's name into their title."""
        title = f"ray::ServeReplica:headroom:{deployment}"
        return [p for p in marked(Path(os.environ[MARK])) if p.cmdline() and p.cmdline()[0].startswith(title)]

    def ledger(self) -> LedgerView:
        return self._call(deployment_name(MODEL), "snapshot")

    def told(self) -> int:
        """How often the ingress has told the ledger how it stands: it does so about once a second."""
        observation: Observation = self._call(deployment_name(MODEL), "observe")
        return max((vitals.sequence for vitals in observation.ingresses), default=0)

    def replicas(self) -> dict[str, ReplicaStatus]:
        """Status of each of the two replicas, by id. Calls without a grant go to any replica, so ask until both did."""
        found: dict[str, ReplicaStatus] = {}

        def both() -> bool:
            status: ReplicaStatus = self._call(pool_deployment_name(MODEL, "default"), "status")
            found[status.replica_id] = status
            return len(found) == 2

        wait_for(both, 30.0)
        return found

    def idle(self) -> bool:
        """No block is promised, held or waited for anywhere."""
        view = self.ledger()
        return view.waiting == 0 and not any(r.charged_blocks or r.held_blocks for r in view.replicas)

    def logged(self, request_id: str) -> list[str]:
        """What the ingress replicas logged of a request, each line with the file that it is from."""
        folder = Path(os.environ[MARK]) / "session_latest" / "logs" / "serve"
        files = sorted(folder.glob("replica_headroom_ingress_*.log"))
        return [
            f"{file.name}: {line}"
            for file in files
            for line in file.read_text(encoding="utf-8", errors="replace").splitlines()
            if request_id in line
        ]

    def proxy_counts(self) -> list[str]:
        """HAProxy's counts for each ingress replica: who broke off, and what was tried again. Empty without HAProxy."""
        if os.environ["RAY_SERVE_ENABLE_HA_PROXY"] != "1":
            return []
        page = httpx.get(f"http://127.0.0.1:{os.environ['RAY_SERVE_HAPROXY_STATS_PORT']}/stats;csv").raise_for_status()
        rows = csv.DictReader(page.text.removeprefix("# ").splitlines())
        servers = [row for row in rows if row["svname"].startswith("SERVE_")]
        return [f"{row['svname']}: " + ", ".join(f"{name} {row[name]}" for name in PROXY_COUNTS) for row in servers]

    def _call(self, deployment: str, method: str) -> Any:
        from ray import serve

        def ask() -> Any:
            handle = serve.get_deployment_handle(deployment, "headroom")
            return getattr(handle, method).remote().result(timeout_s=20)

        with ThreadPoolExecutor(1) as thread:  # Serve refuses to block in a thread that runs an event loop
            return thread.submit(ask).result()


def free_port() -> int:
    return free_ports(1)[0]


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    """The embedded model as a folder. A missing wheel fails the tests: `make test` installs it."""
    return store.fetch("demo", home=state_folder()).path


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, demo_folder: Path) -> Iterator[Service]:
    model = {"name": MODEL, "aliases": ["alias"], "queue_limit": 1000, "pools": [{"replicas": 2}]}
    api = {"max_body_bytes": 200_000, "cors_origins": ["https://ui.example"]}
    with start_service(tmp_path_factory.mktemp("service"), demo_folder, model, api) as service:
        yield service


@contextmanager
def start_service(folder: Path, source: Path, model: dict[str, Any], api: dict[str, Any]) -> Iterator[Service]:
    """A running service of one model with a Ray of its own; `folder` gets its serve_config.yaml."""
    port = free_port()
    path = folder / "serve_config.yaml"
    write_config(path, port, {"models": [{"source": str(source), **model}], "api": api})
    ray = LocalRay(state_folder(), cpus=os.cpu_count() or 1)
    os.environ.pop("RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP", None)  # read by this process already
    try:
        ray.start()
        redeploy(path)
        yield Service(f"http://127.0.0.1:{port}", path)
    finally:
        ray.stop()


def write_config(path: Path, port: int, args: dict[str, Any]) -> None:
    application = {"name": "headroom", "import_path": "deployments.app:build", "args": args}
    config = {"http_options": {"port": port}, "applications": [application]}
    path.write_text(yaml.safe_dump(config), encoding="utf-8")


def redeploy(path: Path) -> None:
    """Deploy what the file says and wait until it is ready."""
    file = read_config(path)
    service.deploy(file)
    deadline = time.monotonic() + START_LIMIT_S

    def check() -> None:
        assert time.monotonic() < deadline, "the service did not start in time"

    service.wait_until_ready(file, print, check)
