"""`headroom serve` as a user meets it: a process that starts, answers, and leaves nothing behind, however it ends."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from deployments.home import state_folder
from tests.integration.conftest import free_port
from tests.waiting import wait_for

CONFIG = """\
applications:
- import_path: deployments.app:build
  args:
    models:
    - name: smol
      source: {source}
      pools: [{{replicas: 1, {pool}}}]
"""
STOP_LIMIT_S = 15.0
FAIL_LIMIT_S = 30.0


class Command:
    """A running `headroom serve` in a session of its own, as a terminal starts it."""

    def __init__(self, config: Path, port: int, log: Path) -> None:
        self.log = log
        environ = {**os.environ, "HEADROOM_HOME": str(state_folder()), "PYTHONUNBUFFERED": "1"}
        environ["RAY_ADDRESS"] = "127.0.0.1:1"  # A cluster that "happens to run" must not be joined.
        with log.open("w", encoding="utf-8") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "deployments.cli", "serve", str(config), "--port", str(port)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environ,
                start_new_session=True,
            )

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def until(self, words: str, limit_s: float = 300.0) -> None:
        def there() -> bool:
            assert self.process.poll() is None, self.said()
            return words in self.said()

        wait_for(there, limit_s)

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def ray_folder(self) -> Path:
        match = re.search(r"logs: (/\S+?/hr-\w+)/", self.said())
        assert match, self.said()
        return Path(match[1])


@contextmanager
def serving(config: Path, port: int, log: Path) -> Iterator[Command]:
    command = Command(config, port, log)
    try:
        yield command
    finally:
        command.process.kill()  # Its reaper does the rest.
        command.process.wait()


def write_config(folder: Path, source: str = "demo", pool: str = "quantization: nf4") -> Path:
    path = folder / "config.yaml"
    path.write_text(CONFIG.format(source=source, pool=pool), encoding="utf-8")
    return path


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_serves_until_interrupted_and_leaves_nothing(tmp_path: Path) -> None:
    port = free_port()
    with serving(write_config(tmp_path), port, tmp_path / "log") as command:
        command.until("until Ctrl-C")
        said = command.said()
        assert "KV capacity" in said
        assert re.search(r"^  \S.* (on paged attention|loaded: read) ", said, re.MULTILINE), "no line of the engine's"
        curl = next(line.strip() for line in said.splitlines() if line.strip().startswith("curl "))
        answer = subprocess.run(
            ["curl", "--silent", "--fail", *shlex.split(curl)[1:]], capture_output=True, text=True, check=True
        )
        assert '"assistant"' in answer.stdout
        family, folder = command.family(), command.ray_folder()
        assert len(family) > 4
        assert folder.is_dir()
        begun = time.monotonic()
        os.killpg(command.process.pid, signal.SIGINT)  # As a terminal does: to every process of the group.
        assert command.process.wait(STOP_LIMIT_S) == 0, command.said()
        assert time.monotonic() - begun < STOP_LIMIT_S
        assert alive(family) == []
        assert is_free(port)
        assert not folder.exists()
        assert "Traceback" not in command.said()


def test_killed_serve_leaves_no_process(tmp_path: Path) -> None:
    port = free_port()
    with serving(write_config(tmp_path), port, tmp_path / "log") as command:
        command.until("until Ctrl-C")
        family, folder = command.family(), command.ray_folder()
        command.process.kill()
        wait_for(lambda: alive(family) == [], 30.0)
        wait_for(lambda: not folder.exists(), 30.0)
        assert is_free(port)


@pytest.mark.parametrize(
    ("source", "pool", "says"),
    [
        ("demo", "quantisation: nf4", "did you mean quantization?"),
        ("./nowhere", "quantization: nf4", "no such folder"),
        ("demo", "cpu_device_memory: 100MB", "does not fit"),
        ("demo", "replicas: 500", "is given twice"),
        ("demo", "cpus: 1000", "ask for 1000 CPUs"),
    ],
)
def test_failed_start_is_one_line_and_no_ray(tmp_path: Path, source: str, pool: str, says: str) -> None:
    command = Command(write_config(tmp_path, source, pool), free_port(), tmp_path / "log")
    assert command.process.wait(FAIL_LIMIT_S) == 2
    lines = command.said().splitlines()
    assert lines[-1].startswith("headroom: ")
    assert says in lines[-1]
    assert not any("starting Ray" in line for line in lines)


def test_busy_port_is_one_line(tmp_path: Path) -> None:
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        command = Command(write_config(tmp_path), port, tmp_path / "log")
        assert command.process.wait(FAIL_LIMIT_S) == 2
    (line,) = command.said().splitlines()
    assert f"port {port}" in line
