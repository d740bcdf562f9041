"""A Ray of our own on this machine: started for one service, and gone with it to the last process.

It never joins a cluster that happens to run (RAY_ADDRESS is dropped), keeps its token in the state folder, and its
files in a short folder under /tmp, because a Unix socket's path is limited to 107 bytes. Should this process be killed,
a reaper ends what it left.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from filelock import FileLock

from deployments import haproxy, reaper
from deployments.api import headers
from deployments.errors import ConfigError
from deployments.processes import MARK, end_processes, marked
from deployments.store import child_environment

OBJECT_STORE_BYTES = 100_000_000
"""Requests and chunks are small and travel by value; Ray's default would be 30 % of memory."""
INGRESS_DRAINING = "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"
SOCKET_PATH_LIMIT = 107
_SESSION_BYTES = 75
"""Longest path of a socket below Ray's temp folder: session_<date>_<time>_<pid>/sockets/plasma_store.<n>."""
_TERM_WAIT_S = 1.5


class LocalRay:
    """One Ray cluster of one node.

    Args:
        home: the state folder: its token, and the logs of the last run.
        cpus: what Ray may hand out; a count for its books, no limit on use.
        show_logs: print what the replicas log.
        dashboard: run Ray's dashboard: ten more processes, some 0.7 GB.
    """

    def __init__(self, home: Path, *, cpus: int, show_logs: bool = False, dashboard: bool = False) -> None:
        self._home, self._cpus, self._show_logs, self._dashboard = home, cpus, show_logs, dashboard
        self._folder: Path | None = None
        self._reaper: subprocess.Popen[bytes] | None = None
        self._raylet: psutil.Process | None = None
        self._replaced: dict[str, str | None] = {}
        """Variables of this process that `start` set, as they were before."""
        self.dashboard_url: str | None = None
        """Set by `start`, where there is one."""

    def start(self) -> None:
        """Start it and connect.

        Raises:
            ConfigError: Ray does not come up; one line.
        """
        self._folder = make_temp_folder()
        self._reaper = reaper.start(self._folder, child_environment())
        set_environment(self._home)
        variables = haproxy.environment(self._folder) | {MARK: str(self._folder)}
        self._replaced = {name: os.environ.get(name) for name in variables}
        os.environ |= variables
        import ray

        try:
            context = ray.init(
                address="local",
                num_cpus=self._cpus,
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=self._dashboard,
                log_to_driver=self._show_logs,
                logging_level=logging.WARNING,
                namespace="headroom",
                _node_ip_address="127.0.0.1",  # Else Ray asks the network for one, and ends when it changes.
                _temp_dir=str(self._folder),
            )
        except Exception as error:  # Ray raises many kinds here, RuntimeError and OSError among them.
            raise ConfigError(f"Ray did not start: {' '.join(str(error).split())[:300]}") from error
        self.dashboard_url = f"http://{context.dashboard_url}" if self._dashboard else None
        self._raylet = next((p for p in marked(self._folder) if p.name() == "raylet"), None)

    @property
    def log_folder(self) -> Path:
        """Where the logs of the running service are."""
        return (self._folder or Path()) / "session_latest" / "logs"

    def alive(self) -> bool:
        """Whether its node's daemon (raylet) runs."""
        return self._raylet is not None and self._raylet.is_running()

    def stop(self, *, serve_wait_s: float = 6.0) -> None:
        """Stop the replicas, Ray, and whatever of their processes is left; keep the logs; remove the folder.

        Args:
            serve_wait_s: how long replicas may take to finish what runs.
        """
        if "ray" in sys.modules:
            until = time.monotonic() + serve_wait_s
            if _within(serve_wait_s + 2.0, lambda: _delete_applications(until)):
                _within(3.0, sys.modules["ray"].shutdown)
        self.kill()

    def kill(self) -> None:
        """End its processes at once, keep the logs, remove the folder, and the variables that name its files."""
        if self._folder is not None:
            end_processes(marked(self._folder), _TERM_WAIT_S)
            _keep_logs(self.log_folder, self._home / "logs")
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
        for name, value in self._replaced.items():  # They name files of the folder, which is gone.
            os.environ.pop(name, None)
            os.environ |= {name: value} if value is not None else {}
        self._replaced = {}
        if self._reaper is not None:
            self._reaper.communicate()
            self._reaper = None


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


def set_environment(home: Path) -> None:
    """Point Ray at our token and away from any cluster. Ray reads this once per process, when it is first imported."""
    home.mkdir(parents=True, exist_ok=True)
    os.environ.pop("RAY_ADDRESS", None)
    os.environ.pop("RAY_AUTH_TOKEN", None)  # Would win over the file.
    os.environ |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(_token(home)),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_AUTO_CONNECT": "0",  # Else a call that comes after the shutdown starts another Ray.
        # Our deployments never block their event loop, so Serve's extra threads are only hops: without them a request
        # is 10 ms faster and the ingress takes a third less CPU (docs/log.md, 2026-11-21).
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": os.environ.get("RAY_SERVE_THROUGHPUT_OPTIMIZED", "1"),
        # HAProxy in front of the ingress instead of Serve's proxy in Python: a request is 8 ms faster, and a streamed
        # token costs half the CPU (docs/log.md, 2026-11-21). Where ray[serve] comes without it, Serve's proxy serves.
        "RAY_SERVE_ENABLE_HA_PROXY": os.environ.get("RAY_SERVE_ENABLE_HA_PROXY", "1" if haproxy.available() else "0"),
        # How long an ingress replica that Serve replaces goes on taking requests. Serve's default, 30 s, would be added
        # to each stop; here only a change of the running service's config (`serve deploy`) wants it.
        INGRESS_DRAINING: os.environ.get(INGRESS_DRAINING, "0"),
        headers.MIDDLEWARES: os.environ.get(headers.MIDDLEWARES, headers.IMPORT_PATH),
        "HEADROOM_HOME": str(home),
    }
    # Workers start in folders of their own, where a checkout that is not installed is not importable.
    root = str(Path(__file__).resolve().parent.parent)
    if root not in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))


def _token(home: Path) -> Path:
    """The file with our Ray's token. The first start makes it; of several at once, the one that holds the lock."""
    token = home / "ray_token"
    if token.exists():
        return token
    with FileLock(home / "ray_token.lock"):
        if not token.exists():
            partial = home / "ray_token.partial"
            with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                file.write(secrets.token_hex(32))
            partial.rename(token)
    return token


def _delete_applications(until: float) -> None:
    """Let replicas finish until then. The controller ends with Ray: one that ends by itself is reported as dead."""
    from ray import serve

    for name in serve.status().applications:
        serve.delete(name, _blocking=False)
    while serve.status().applications and time.monotonic() < until:
        time.sleep(0.1)


def _within(limit_s: float, action: Callable[[], object]) -> bool:
    """Run `action` for at most `limit_s` seconds; what it leaves undone, killing the processes does.

    Returns:
        Whether it ended. One that did not must not find Ray shut down: a call of Ray's ends the process then.
    """
    thread = threading.Thread(target=_quietly, args=(action,), daemon=True)
    thread.start()
    thread.join(limit_s)
    return not thread.is_alive()


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
