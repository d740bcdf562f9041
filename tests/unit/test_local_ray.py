"""What can be said of our own Ray without starting one."""

from __future__ import annotations

import importlib.util
import os
import stat
import tempfile
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


def test_haproxy_keeps_its_files_and_ports_to_itself(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, second = (local_ray.haproxy_environment(tmp_path / name) for name in "ab")
    files = [name for name, value in first.items() if value.startswith(str(tmp_path / "a"))]
    assert {"RAY_SERVE_HAPROXY_CONFIG_FILE_LOC", "RAY_SERVE_HAPROXY_SOCKET_PATH"} <= set(files)
    assert all(first[name] != second[name] for name in files)
    ports = [
        environment[f"RAY_SERVE_HAPROXY_{name}_PORT"]
        for environment in (first, second)
        for name in ("METRICS", "STATS")
    ]
    assert first["RAY_SERVE_HAPROXY_METRICS_PORT"] != first["RAY_SERVE_HAPROXY_STATS_PORT"]
    assert all(1024 < int(port) < 65536 for port in ports)


def test_every_haproxy_setting_is_one_that_serve_reads(tmp_path: Path) -> None:
    constants = Path(str(importlib.util.find_spec("ray").submodule_search_locations[0])) / "serve/_private/constants.py"  # type: ignore[union-attr, index]  # ray is installed
    text = constants.read_text(encoding="utf-8")
    assert [name for name in local_ray.haproxy_environment(tmp_path) if f'"{name}"' not in text] == []
