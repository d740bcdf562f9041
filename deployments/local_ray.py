"""A Ray of our own on this machine: started for one service, and gone with it to the last process.

It never joins a cluster that happens to run (RAY_ADDRESS is dropped), keeps its token in the state folder, and its
files in a short folder under /tmp, because a Unix socket's path is limited to 107 bytes. Ray ties its daemons to this
process (PR_SET_PDEATHSIG), so they end even when it is killed; what they started ends with them.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from deployments.errors import ConfigError

OBJECT_STORE_BYTES = 100_000_000
"""Requests and chunks are small and travel by value; Ray's default would be 30 % of memory."""
SOCKET_PATH_LIMIT = 107
_SESSION_BYTES = 75
"""Longest path of a socket below Ray's temp folder: session_<date>_<time>_<pid>/sockets/plasma_store.<n>."""
_TERM_WAIT_S = 2.0


class LocalRay:
    """One Ray cluster of one node.

    Args:
        home: the state folder: its token, and the logs of the last run.
        cpus: what Ray may hand out; a count for its books, no limit on use.
        show_logs: print what the replicas log.
    """

    def __init__(self, home: Path, *, cpus: int, show_logs: bool = False) -> None:
        self._home, self._cpus, self._show_logs = home, cpus, show_logs
        self._folder: Path | None = None
        self._processes: dict[int, psutil.Process] = {}
        self.dashboard_url: str | None = None
        """Set by `start`."""

    def start(self) -> None:
        """Start it and connect.

        Raises:
            ConfigError: Ray does not come up; one line.
        """
        set_environment(self._home)
        self._folder = make_temp_folder()
        import ray

        try:
            context = ray.init(
                address="local",
                num_cpus=self._cpus,
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=True,
                log_to_driver=self._show_logs,
                logging_level=logging.WARNING,
                namespace="headroom",
                _temp_dir=str(self._folder),
            )
        except Exception as error:  # Ray raises many kinds here, RuntimeError and OSError among them.
            raise ConfigError(f"Ray did not start: {' '.join(str(error).split())[:300]}") from error
        self.dashboard_url = f"http://{context.dashboard_url}" if context.dashboard_url else None
        self.note_processes()

    @property
    def log_folder(self) -> Path:
        """Where the logs of the running service are."""
        return (self._folder or Path()) / "session_latest" / "logs"

    def note_processes(self) -> None:
        """Remember which processes belong to it now: once their parent is gone, nothing else tells."""
        for process in psutil.Process().children(recursive=True):
            self._processes[process.pid] = process

    def alive(self) -> bool:
        """Whether its node's daemon (raylet) runs."""
        return any(p.is_running() and _name(p) == "raylet" for p in self._processes.values())

    def stop(self, *, serve_wait_s: float = 8.0) -> None:
        """Stop the replicas, Ray, and whatever of their processes is left; keep the logs; remove the folder.

        Args:
            serve_wait_s: how long replicas may take to finish what runs.
        """
        self.note_processes()
        if "ray" in sys.modules:
            _within(serve_wait_s, _delete_applications)
            self.note_processes()
            _within(4.0, sys.modules["ray"].shutdown)
        self.kill()

    def kill(self) -> None:
        """End its processes at once, keep the logs, and remove the folder."""
        self.note_processes()
        end_processes(list(self._processes.values()), _TERM_WAIT_S)
        if self._folder is not None:
            _keep_logs(self.log_folder, self._home / "logs")
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


def make_temp_folder() -> Path:
    """A new folder for Ray, short enough for its sockets.

    Raises:
        ConfigError: no folder short enough can be written to.
    """
    for parent in dict.fromkeys(("/tmp", tempfile.gettempdir())):
        if os.access(parent, os.W_OK) and len(parent) + len("/hr-xxxxxxxx/") + _SESSION_BYTES <= SOCKET_PATH_LIMIT:
            return Path(tempfile.mkdtemp(prefix="hr-", dir=parent))
    raise ConfigError(
        f"Ray's sockets need a writable folder with a short path (they are limited to {SOCKET_PATH_LIMIT} bytes): "
        f"neither /tmp nor {tempfile.gettempdir()} is one; make /tmp writable or set TMPDIR"
    )


def end_processes(processes: list[psutil.Process], wait_s: float) -> None:
    """Ask each process to end, and kill those that still run after `wait_s` seconds. Ended ones are passed over."""
    for process in processes:
        _signal(process.terminate)
    _, left = psutil.wait_procs(processes, timeout=wait_s)
    for process in left:
        _signal(process.kill)
    psutil.wait_procs(left, timeout=wait_s)


def set_environment(home: Path) -> None:
    """Point Ray at our token and away from any cluster. Ray reads this once per process, when it is first imported."""
    home.mkdir(parents=True, exist_ok=True)
    token = home / "ray_token"
    if not token.exists():
        with os.fdopen(os.open(token, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
    os.environ.pop("RAY_ADDRESS", None)
    os.environ.pop("RAY_AUTH_TOKEN", None)  # Would win over the file.
    os.environ |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "HEADROOM_HOME": str(home),
    }
    # Workers start in folders of their own, where a checkout that is not installed is not importable.
    root = str(Path(__file__).resolve().parent.parent)
    if root not in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))


def _delete_applications() -> None:
    """Let replicas finish. Serve's controller ends with Ray: asked to end by itself, it is reported as dead."""
    from ray import serve

    for name in serve.status().applications:
        serve.delete(name)


def _within(limit_s: float, action: Callable[[], object]) -> None:
    """Run `action` for at most `limit_s` seconds; what it leaves undone, killing the processes does."""
    thread = threading.Thread(target=_quietly, args=(action,), daemon=True)
    thread.start()
    thread.join(limit_s)


def _quietly(action: Callable[[], object]) -> None:
    try:
        action()
    except Exception as error:  # noqa: BLE001  a Ray that died first raises as it likes, and is stopped all the same
        print(f"while stopping: {type(error).__name__}: {' '.join(str(error).split())[:200]}", file=sys.stderr)


def _keep_logs(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target, ignore_dangling_symlinks=True)
        os.utime(target, (time.time(), time.time()))


def _signal(send: Callable[[], None]) -> None:
    try:
        send()
    except psutil.NoSuchProcess:
        return


def _name(process: psutil.Process) -> str:
    try:
        return str(process.name())
    except psutil.NoSuchProcess:
        return ""
