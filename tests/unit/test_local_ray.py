"""What can be said of our own Ray without starting one."""

from __future__ import annotations

import os
import stat
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from deployments import local_ray
from deployments.errors import ConfigError


def test_temp_folder_is_short_enough_for_rays_sockets() -> None:
    folder = local_ray.make_temp_folder()
    try:
        socket_path = folder / "session_2026-11-21_06-27-25_123456_1234567" / "sockets" / "plasma_store.1"
        assert len(str(socket_path)) <= local_ray.SOCKET_PATH_LIMIT
    finally:
        folder.rmdir()


def test_long_temp_folder_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "gettempdir", lambda: "/tmp/" + 40 * "x")
    monkeypatch.setattr(os, "access", lambda path, _mode: path != "/tmp")
    with pytest.raises(ConfigError, match="TMPDIR"):
        local_ray.make_temp_folder()


def test_environment_is_our_own_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_USAGE_STATS_ENABLED", "HEADROOM_HOME"):
        monkeypatch.setenv(name, "before")  # So that monkeypatch restores it.
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    local_ray.set_environment(tmp_path)
    token = tmp_path / "ray_token"
    assert "RAY_ADDRESS" not in os.environ
    assert os.environ["RAY_AUTH_TOKEN_PATH"] == str(token)
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    first = token.read_text(encoding="ascii")
    assert len(first) == 64
    local_ray.set_environment(tmp_path)
    assert token.read_text(encoding="ascii") == first


def test_first_starts_at_once_have_one_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def slowly(size: int) -> str:
        made.append(f"{len(made):0{2 * size}x}")
        time.sleep(0.1)
        return made[-1]

    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_USAGE_STATS_ENABLED", "HEADROOM_HOME", "PYTHONPATH"):
        monkeypatch.setenv(name, "before")
    monkeypatch.setattr("deployments.local_ray.secrets.token_hex", slowly)

    def start(_: int) -> str:
        local_ray.set_environment(tmp_path)
        return (tmp_path / "ray_token").read_text(encoding="ascii")

    with ThreadPoolExecutor(4) as threads:
        tokens = set(threads.map(start, range(4)))
    assert (list(tokens), len(made[0])) == (made, 64)
    assert stat.S_IMODE((tmp_path / "ray_token").stat().st_mode) == 0o600


def test_variables_that_name_files_of_the_folder_go_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        assert set(os.environ) > set(before)
        raise RuntimeError("no Ray today")

    monkeypatch.setenv("RAY_SERVE_HAPROXY_BINARY_PATH", "/opt/haproxy")
    monkeypatch.setattr("ray.init", refuse)
    monkeypatch.setattr(local_ray, "set_environment", lambda _home: None)  # Its variables stay: Ray reads them once.
    before = dict(os.environ)
    started = local_ray.LocalRay(tmp_path, cpus=1)
    with pytest.raises(ConfigError, match="no Ray today"):
        started.start()
    assert os.environ["RAY_SERVE_HAPROXY_BINARY_PATH"] != "/opt/haproxy"
    started.kill()
    assert dict(os.environ) == before


def test_ray_is_not_shut_down_under_a_call_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()
    shut: list[bool] = []
    monkeypatch.setattr(local_ray, "_delete_applications", lambda _until: answered.wait(60))
    monkeypatch.setattr("ray.shutdown", lambda: shut.append(True))
    local_ray.LocalRay(tmp_path, cpus=1).stop(serve_wait_s=-1.9)
    assert not shut
    answered.set()
    local_ray.LocalRay(tmp_path, cpus=1).stop()
    assert shut == [True]
