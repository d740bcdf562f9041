"""A Headroom of the benchmark's own: `headroom serve` on a free port, as a user starts it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx

from benchmarks.child import ROOT
from benchmarks.client import LoadFailed
from deployments.ports import free_ports

START_LIMIT_S = 600.0
STOP_LIMIT_S = 30.0


class OwnServer:
    """Starts serving on construction; `stop` ends it.

    Args:
        config: path of the Serve config, used as it is.
        log: file that takes what the server prints.

    Raises:
        LoadFailed: it ended, or was not ready in time.
    """

    def __init__(self, config: Path, log: Path) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._log = log
        with log.open("w") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "deployments.cli", "serve", str(config), "--port", str(port)],
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    @property
    def pid(self) -> int:
        """Of `headroom serve`."""
        return self._process.pid

    def _wait_until_ready(self) -> None:
        limit = time.monotonic() + START_LIMIT_S
        while not _ready(self.url):
            if self._process.poll() is not None:
                raise LoadFailed(f"headroom serve ended with code {self._process.returncode}; see {self._log}")
            if time.monotonic() > limit:
                raise LoadFailed(f"headroom serve was not ready within {START_LIMIT_S:.0f} s; see {self._log}")
            time.sleep(0.5)

    def stop(self) -> None:
        """Ctrl-C, and wait; kill it if it has not ended in time."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    return free_ports(1)[0]


def wait_until_ready(url: str, limit_s: float = START_LIMIT_S) -> None:
    """Return once `GET /ready` answers 200.

    Raises:
        LoadFailed: it did not in time.
    """
    limit = time.monotonic() + limit_s
    while not _ready(url):
        if time.monotonic() > limit:
            raise LoadFailed(f"{url} was not ready within {limit_s:.0f} s")
        time.sleep(0.5)


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", timeout=5).status_code == 200
    except httpx.TransportError:
        return False
