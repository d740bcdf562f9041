"""Ports for servers that start later."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from deployments import ports
from deployments.ports import free_ports


def test_they_differ_are_free_and_not_given_to_outgoing_connections() -> None:
    found = free_ports(5)
    assert len(set(found)) == 5
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as client,
    ):
        assert max(found) < client.getsockname()[1]
    for port in found:
        with socket.create_server(("127.0.0.1", port)):
            pass


def test_taken_ports_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    (port,) = free_ports(1)
    monkeypatch.setattr(ports, "_ABOVE_RAYS", port)
    monkeypatch.setattr(ports, "_first_outgoing", lambda: port + 2)
    with socket.create_server(("127.0.0.1", port)):
        assert port not in free_ports(1)


def test_none_left_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    (port,) = free_ports(1)
    monkeypatch.setattr(ports, "_ABOVE_RAYS", port)
    monkeypatch.setattr(ports, "_first_outgoing", lambda: port + 1)
    with socket.create_server(("127.0.0.1", port)), pytest.raises(OSError, match="1 ports are needed, and 0 of"):
        free_ports(1)


def test_where_the_range_is_not_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ports, "_RANGE", tmp_path / "none")
    assert ports._first_outgoing() == 32_768
