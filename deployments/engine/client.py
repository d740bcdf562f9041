"""The replica's end of the engine process: start it, submit, stream, abort, notice its death. asyncio; no torch."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection

from deployments.engine.messages import Commands, EngineSpec, Failed, Started, StepReport
from deployments.engine.outbox import Outbox, interval_s
from deployments.engine.tally import EngineTally
from deployments.errors import ConfigError
from deployments.protocol import LOST, NO_CHANGE, GenerationRequest, TokenChunk


class EngineClient:
    """One engine process. All methods belong to one event loop.

    Args:
        on_report: called after each step's report, once its chunks are in their streams.
    """

    def __init__(self, on_report: Callable[[], None] = lambda: None) -> None:
        self.held: dict[str, int] = {}
        """KV blocks by request id, as of the last report."""
        self.held_news: tuple[tuple[str, int], ...] = ()
        """Those of `held` that the last report changed."""
        self.shared_blocks = 0
        """By how many blocks the sum of `held` is too much, because requests share prefixes."""
        self.granules = NO_CHANGE
        """What the last report said to have changed in the prefix cache."""
        self.cached_blocks = 0
        self.preemptions = 0
        self.tally = EngineTally()
        self.failure: str | None = None
        """Why the engine is gone; None while it lives."""
        self._on_report = on_report
        self._streams: dict[str, Outbox] = {}
        self._releasing: asyncio.TimerHandle | None = None
        self._pending = Commands()
        self._sending = False
        self._started: asyncio.Future[Started] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        # A full pipe, and a process that takes its time to end, must hold up this thread and not the event loop.
        self._writer = ThreadPoolExecutor(1, "engine-commands")

    @property
    def pid(self) -> int | None:
        """Process id of the engine, once it was started."""
        return self._process.pid if self._process else None

    async def start(self, spec: EngineSpec) -> Started:
        """Start the process and wait until the model is loaded and checked.

        Raises:
            ConfigError: the engine's own reason, or that it ended without one.
        """
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        command = [sys.executable, "-m", "deployments.engine.process", str(theirs.fileno())]
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment)
        theirs.close()
        self._connection = Connection(ours.detach())
        self._started = loop.create_future()
        loop.add_reader(self._connection.fileno(), self._read)
        self._writer.submit(self._write, spec)
        try:
            return await self._started
        except asyncio.CancelledError:
            self._fail("its start was cancelled")
            raise

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        """Stream a request's chunks up to its terminal one; leaving early aborts it."""
        if self.failure is not None:
            yield _failed(request.request_id, self.failure)
            return
        stream = self._streams[request.request_id] = Outbox()
        self.tally.submitted(request)
        self._send(submit=(request,))
        try:
            while True:
                chunk = await stream.get()
                if chunk.finish_reason is not None:
                    self._streams.pop(request.request_id, None)
                yield chunk
                if chunk.finish_reason is not None:
                    return
        finally:
            if self._streams.pop(request.request_id, None) is not None:
                self._send(abort=(request.request_id,))

    def stop(self) -> None:
        """End the process; its live requests end with an error."""
        self._fail("the replica is shutting down")

    def _send(self, submit: tuple[GenerationRequest, ...] = (), abort: tuple[str, ...] = ()) -> None:
        if self.failure is not None:
            return
        self._pending = Commands(self._pending.submit + submit, self._pending.abort + abort)
        if not self._sending:
            self._sending = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        """Hand everything that piled up to the writer; what comes meanwhile goes with the next message."""
        self._sending = False
        if self.failure is not None or self._connection is None:
            return
        commands, self._pending = self._pending, Commands()
        if commands != Commands():
            self._writer.submit(self._write, commands)

    def _write(self, message: Commands | EngineSpec) -> None:
        assert self._connection is not None
        try:
            self._connection.send(message)
        except OSError:
            return  # the reader sees the same broken connection, and fails every request

    def _read(self) -> None:
        assert self._connection is not None
        try:
            message = self._connection.recv()
        except (EOFError, OSError):
            self._explain_end()
            return
        match message:
            case StepReport():
                self._take(message)
            case Started():
                assert self._started is not None
                self._started.set_result(message)
            case Failed(reason):
                self._fail(reason)

    def _explain_end(self) -> None:
        """The connection broke without a message: fail with how the process ended."""
        assert self._process is not None
        assert self._connection is not None
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._connection.fileno())
        ended = loop.run_in_executor(self._writer, self._process.wait)
        ended.add_done_callback(lambda code: self._fail(_how_it_ended(code.result())))

    def _take(self, report: StepReport) -> None:
        for request_id in report.gone:
            self.held.pop(request_id, None)
        self.held.update(report.held)
        self.held_news = report.held
        self.shared_blocks, self.granules = report.shared_blocks, report.granules
        self.cached_blocks, self.preemptions = report.cached_blocks, report.preemptions
        self.tally.reported(report)
        self._pass_on(report.chunks)
        self._on_report()

    def _pass_on(self, chunks: Iterable[TokenChunk]) -> None:
        now, interval = asyncio.get_running_loop().time(), interval_s(len(self._streams))
        held = []
        for chunk in chunks:
            stream = self._streams.get(chunk.request_id)
            if stream is not None and not stream.put(chunk, now, interval):
                held.append(stream.due)
        if held:
            self._release_at(min(held))

    def _release(self) -> None:
        """Let go what is due, and come back when the next is."""
        now, interval = asyncio.get_running_loop().time(), interval_s(len(self._streams))
        self._releasing = None
        if due := [stream.due for stream in self._streams.values() if not stream.release(now, interval)]:
            self._release_at(min(due))

    def _release_at(self, due: float) -> None:
        """Call `_release` at that time, unless it is called before. With fewer streams chunks are due sooner."""
        if self._releasing is not None:
            if self._releasing.when() <= due:
                return
            self._releasing.cancel()
        self._releasing = asyncio.get_running_loop().call_at(due, self._release)

    def _fail(self, reason: str) -> None:
        if self.failure is not None:
            return
        self.failure, self.held, self.held_news = reason, {}, ()
        self.shared_blocks, self.granules = 0, NO_CHANGE
        for request_id, stream in self._streams.items():
            stream.put(_failed(request_id, reason), 0.0, 0.0)  # the last chunk goes at any time
        if self._releasing is not None:
            self._releasing.cancel()
        if self._started is not None and not self._started.done():
            self._started.set_exception(ConfigError(reason))
        if self._process is not None and self._connection is not None:
            asyncio.get_running_loop().remove_reader(self._connection.fileno())
            # It has nothing to save. Killed first, so that a write which waits for it ends.
            self._process.kill()
            self._writer.submit(self._process.wait)
            self._writer.submit(self._connection.close)
        self._writer.shutdown(wait=False)
        self._on_report()


def _failed(request_id: str, reason: str) -> TokenChunk:
    return TokenChunk(request_id, finish_reason="error", error=LOST + reason)


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"the engine process ended with exit code {code}; its log tells why"
    name = signal.Signals(-code).name
    return f"the engine process was ended by {name}" + (
        "; the machine may be out of memory" if name == "SIGKILL" else ""
    )
