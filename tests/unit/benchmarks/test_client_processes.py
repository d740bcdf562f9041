"""Clients in processes of their own: what each gets, that it is one load, and that the end of one ends it."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import MagicMock

import psutil
import pytest

from benchmarks.client import LoadFailed
from benchmarks.client_processes import ClientProcesses, client_processes, default_processes, divide
from benchmarks.serve_load import Benchmark, _parse
from tests.unit.benchmarks.test_serve_load import stream_body

TOKENS = 3


@pytest.mark.parametrize(
    ("clients", "cores", "processes"), [(1, 64, 1), (8, 64, 1), (9, 64, 2), (64, 64, 8), (64, 16, 4), (64, 2, 1)]
)
def test_default_is_a_process_for_eight_clients_and_a_quarter_of_the_cores(
    clients: int, cores: int, processes: int
) -> None:
    assert default_processes(clients, cores) == processes


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("clients", [1, 2, 7, 64])
@pytest.mark.parametrize("count", [1, 8, 130])
def test_every_prompt_and_client_is_in_one_share(count: int, clients: int, processes: int) -> None:
    texts = [str(i) for i in range(count)]
    shares = divide(texts, clients, processes)
    assert len(shares) == min(processes, clients)
    assert [text for its, _ in shares for text in its] == texts
    counts = [its for _, its in shares]
    assert (sum(counts), min(counts) > 0, max(counts) - min(counts) <= 1) == (clients, True, True)
    for its, mine in shares:
        assert abs(len(its) - count * mine / clients) < 1, "as many for each client"


@dataclass
class Server:
    """A service that streams the same answer to all; tests change it while it runs."""

    url: str = ""
    ready: bool = True
    takes_s: float = 0.0
    refuses: str | None = None
    """The prompt that gets 429."""
    kills: int | None = None
    """The process to kill when the next prompt comes."""
    prompts: list[str] = field(default_factory=list)
    running: int = 0
    most: int = 0
    """Requests at once."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, prompt: str) -> tuple[int, bytes]:
        with self.lock:
            if self.kills is not None:
                os.kill(self.kills, signal.SIGKILL)
                self.kills = None
            self.prompts.append(prompt)
            self.running += 1
            self.most = max(self.most, self.running)
        time.sleep(self.takes_s)
        with self.lock:
            self.running -= 1
        return (429, b"queue full") if prompt == self.refuses else (200, stream_body(["a", "b"], TOKENS))


@contextmanager
def serving(server: Server) -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(200 if server.ready and self.path == "/ready" else 503, b"")

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            assert body["model"] == "m"
            self.reply(*server.answer(body["messages"][0]["content"]))

        def reply(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    class Http(ThreadingHTTPServer):
        request_queue_size = 64  # With the default of 5 the kernel resets some of the connections made at once.

    with Http(("127.0.0.1", 0), Handler) as http:
        server.url = f"http://127.0.0.1:{http.server_port}"
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield server
        http.shutdown()


def run(processes: ClientProcesses, texts: list[str], clients: int) -> int:
    """One load; how many answers `done` was told of."""
    told = 0

    def done() -> None:
        nonlocal told
        told += 1

    begun = time.perf_counter()
    answers = processes.run(texts, clients=clients, output_tokens=TOKENS, done=done)
    ended = time.perf_counter()
    assert sorted(answer.prompt for answer in answers) == sorted(texts)
    assert {(answer.text, answer.prompt_tokens) for answer in answers} == {("ab", 7)}
    assert all(begun < answer.sent < answer.arrivals[0] <= answer.ended < ended for answer in answers), "one clock"
    return told


def test_processes_share_a_load_and_take_another() -> None:
    with serving(Server(takes_s=0.2)) as server, client_processes(2, server.url, "m") as processes:
        assert run(processes, [str(i) for i in range(8)], clients=4) == 8
        assert server.most == 4, "two clients in each of both"
        assert run(processes, ["one"], clients=1) == 1
        pids = processes.pids
    assert server.prompts[-1] == "one"
    assert sorted(server.prompts[:-1]) == [str(i) for i in range(8)]
    assert len(set(pids)) == 2
    assert not any(map(psutil.pid_exists, pids))


def test_what_one_is_refused_ends_the_load_and_all_processes() -> None:
    server = Server(takes_s=0.2, refuses="3")
    with serving(server), client_processes(2, server.url, "m") as processes:
        with pytest.raises(LoadFailed, match="HTTP 429: queue full"):
            run(processes, [str(i) for i in range(40)], clients=2)
        pids = processes.pids
    assert not any(map(psutil.pid_exists, pids))
    assert len(server.prompts) < 40


def test_a_process_that_is_killed_under_a_load_is_no_measurement() -> None:
    with serving(Server()) as server, client_processes(2, server.url, "m") as processes:
        server.kills = processes.pids[1]
        with pytest.raises(LoadFailed, match="ended with code -9"):
            run(processes, ["a", "b"], clients=2)
        with pytest.raises(LoadFailed, match="ended with code -9"):
            run(processes, ["a", "b"], clients=2)


def test_a_service_that_is_not_ready_gets_no_load() -> None:
    server = Server(ready=False)
    with serving(server), pytest.raises(LoadFailed, match="503"), client_processes(1, server.url, "m"):
        pass


@pytest.mark.parametrize(("chosen", "processes"), [(["--client-processes", "2"], 2), ([], 1)])
def test_serve_load_runs_as_many_as_chosen_and_reports_them(tmp_path: Path, chosen: list[str], processes: int) -> None:
    subject = MagicMock(cores=4)
    subject.model.name = "m"
    with serving(Server(takes_s=0.1)) as server:
        arguments = ["--url", server.url, "--no-baseline", "--concurrency", "1,16", "--rounds", "1", *chosen]
        report = Benchmark(_parse([*arguments, "--output-tokens", str(TOKENS)]), subject, tmp_path).measure()
    assert report.setup["client_processes"] == processes
    assert [sum(map(len, level.rounds)) for level in report.levels] == [8, 32]
    [part] = report.cpu
    assert (part.role, part.processes) == ("clients", processes), "where the service's processes are is not known"
