"""The clients of `benchmarks.client` in several processes, so that what limits a load is the service.

They are started and connected before the first load, and wait at their pipes in between: a load is what releases them.
Instants of their answers can be compared, as `time.perf_counter` is one clock (CLOCK_MONOTONIC) for all processes of a
Linux machine.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

import httpx

from benchmarks.client import Answer, LoadFailed, run_clients

CLIENTS_PER_PROCESS = 8
CORES_PER_PROCESS = 4
"""Of the machine, at least: the other three are the service's."""


def default_processes(clients: int, cores: int) -> int:
    """For so many clients on a machine of so many cores."""
    return max(1, min(-(-clients // CLIENTS_PER_PROCESS), cores // CORES_PER_PROCESS))


def divide(prompts: Sequence[str], clients: int, processes: int) -> list[tuple[Sequence[str], int]]:
    """Prompts and number of clients of each process, as even as can be; no process without a client.

    A share is prompts that follow each other; it has the mixture of lengths that all have where it is whole cycles.
    """
    processes = min(processes, clients)
    bounds = [clients * i // processes for i in range(processes + 1)]
    return [
        (prompts[len(prompts) * low // clients : len(prompts) * high // clients], high - low)
        for low, high in pairwise(bounds)
    ]


class ClientProcesses:
    """Processes that wait for loads; `client_processes` starts and ends them. After a LoadFailed they take no more."""

    def __init__(self, workers: dict[Connection, SpawnProcess]) -> None:
        self._workers = workers

    @property
    def pids(self) -> list[int]:
        """Of all that were started."""
        return [process.pid for process in self._workers.values() if process.pid is not None]

    def wait_until_connected(self) -> None:
        """Raises LoadFailed."""
        self._collect(self._workers, lambda: None)

    def run(
        self, prompts: Sequence[str], *, clients: int, output_tokens: int, done: Callable[[], object]
    ) -> list[Answer]:
        """Send every prompt once, `clients` at a time in all processes together; `done` is called after each answer.

        Raises:
            LoadFailed: as `run_clients`, or a process ended.
        """
        shares = dict(zip(self._workers, divide(prompts, clients, len(self._workers)), strict=False))
        for pipe, (texts, count) in shares.items():
            try:
                pipe.send((texts, count, output_tokens))
            except OSError:
                raise self._ended(pipe) from None
        return self._collect(shares, done)

    def _collect(self, pipes: Collection[Connection], done: Callable[[], object]) -> list[Answer]:
        """What each sends in the end; of those before it, None, each is an answer."""
        answers: list[Answer] = []
        left = set(pipes)
        while left:
            for pipe in wait(left):
                assert isinstance(pipe, Connection)
                match self._receive(pipe):
                    case None:
                        done()
                    case LoadFailed() as failed:
                        raise failed
                    case its:
                        answers += its
                        left.remove(pipe)
        return answers

    def _receive(self, pipe: Connection) -> list[Answer] | LoadFailed | None:
        try:
            message: list[Answer] | LoadFailed | None = pipe.recv()
        except (EOFError, OSError):
            raise self._ended(pipe) from None
        return message

    def _ended(self, pipe: Connection) -> LoadFailed:
        process = self._workers[pipe]
        process.join()
        return LoadFailed(f"a process of clients ended with code {process.exitcode}; what it printed is above")


@contextmanager
def client_processes(count: int, url: str, model: str) -> Iterator[ClientProcesses]:
    """So many, connected to the service at `url`, for loads on `model`.

    Raises:
        LoadFailed: the service is not ready.
    """
    context = get_context("spawn")
    workers: dict[Connection, SpawnProcess] = {}
    try:
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve_loads, args=(theirs, url, model), daemon=True)
            process.start()
            workers[ours] = process
            theirs.close()  # Else its end would not be seen here.
        processes = ClientProcesses(workers)
        processes.wait_until_connected()
        yield processes
    finally:
        for process in workers.values():
            process.terminate()
        for process in workers.values():
            process.join()


def _serve_loads(pipe: Connection, url: str, model: str) -> None:
    """A process's main function."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process.
    try:
        asyncio.run(_run_loads(pipe, url, model))
    except (LoadFailed, httpx.HTTPError) as error:
        pipe.send(LoadFailed(str(error) or type(error).__name__))
    except (EOFError, BrokenPipeError):
        return  # The parent is gone.


async def _run_loads(pipe: Connection, url: str, model: str) -> None:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=httpx.Timeout(600), limits=limits) as http:
        (await http.get("/ready")).raise_for_status()
        pipe.send([])
        while True:
            prompts, clients, output_tokens = pipe.recv()
            answers = await run_clients(
                http, model, prompts, clients=clients, output_tokens=output_tokens, done=lambda: pipe.send(None)
            )
            pipe.send(answers)
