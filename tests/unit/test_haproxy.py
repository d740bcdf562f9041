"""HAProxy's files and ports, and the real HAProxy noticing that a client has left."""

from __future__ import annotations

import contextlib
import importlib.util
import queue
import socket
import subprocess
import threading
from pathlib import Path

from deployments import haproxy


def test_haproxy_keeps_its_files_and_ports_to_itself(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, second = (haproxy.environment(tmp_path / name) for name in "ab")
    files = [name for name, value in first.items() if value.startswith(str(tmp_path / "a"))]
    assert {"RAY_SERVE_HAPROXY_CONFIG_FILE_LOC", "RAY_SERVE_HAPROXY_SOCKET_PATH"} <= set(files)
    assert all(first[name] != second[name] for name in files)
    ports = [[int(value) for name, value in one.items() if name.endswith("_PORT")] for one in (first, second)]
    assert [len(set(one)) for one in ports] == [4, 4]
    assert all(1024 < port < 65536 for one in ports for port in one)


def test_every_haproxy_setting_is_one_that_serve_reads(tmp_path: Path) -> None:
    constants = Path(str(importlib.util.find_spec("ray").submodule_search_locations[0])) / "serve/_private/constants.py"  # type: ignore[union-attr, index]  # ray is installed
    text = constants.read_text(encoding="utf-8")
    assert [name for name in haproxy.environment(tmp_path) if f'"{name}"' not in text] == []


CONFIG = """
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
    option abortonclose
    option splice-request
    option splice-response
    option http-no-delay
frontend front
    bind fd@{front}
    default_backend back
backend back
    server only 127.0.0.1:{back}
"""
"""The lines of Serve's configuration that matter here."""


def test_a_client_that_leaves_is_noticed_when_its_body_came_in_a_packet_of_its_own(tmp_path: Path) -> None:
    launcher = haproxy.environment(tmp_path)["RAY_SERVE_HAPROXY_BINARY_PATH"]
    with socket.create_server(("127.0.0.1", 0)) as front, socket.create_server(("127.0.0.1", 0)) as back:
        config = tmp_path / "haproxy.cfg"
        config.write_text(CONFIG.format(front=front.fileno(), back=back.getsockname()[1]))
        process = subprocess.Popen([launcher, "-db", "-f", str(config)], pass_fds=[front.fileno()])
        try:
            seen: queue.Queue[bytes] = queue.Queue()
            server = threading.Thread(target=_never_answer, args=(back, seen), daemon=True)
            server.start()
            with socket.create_connection(front.getsockname()) as client:
                client.sendall(b"POST / HTTP/1.1\r\nHost: here\r\nContent-Length: 2\r\n\r\n")
                assert seen.get(timeout=30).startswith(b"POST / ")
                client.sendall(b"{}")
                assert seen.get(timeout=30) == b"{}"
            assert seen.get(timeout=30) == b""
        finally:
            process.kill()
            process.wait()
        server.join()


def _never_answer(back: socket.socket, seen: queue.Queue[bytes]) -> None:
    """Put what comes into `seen`, and b"" when the connection ends."""
    connection, _ = back.accept()
    with connection, contextlib.suppress(ConnectionResetError):
        while part := connection.recv(4096):
            seen.put(part)
    seen.put(b"")
