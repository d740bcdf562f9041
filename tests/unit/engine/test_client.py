"""The replica's end of the pipe, against an engine that is only a connection; the process is the contract tests'."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import pytest

from deployments.engine import outbox
from deployments.engine.client import EngineClient, _how_it_ended
from deployments.engine.messages import Commands, Failed, StepReport
from deployments.protocol import LOST, TokenChunk
from tests.unit.engine.tiny import request


class Wired:
    """A client whose engine is the other end of a pipe."""

    def __init__(self) -> None:
        self.reports: list[tuple[dict[str, int], str | None]] = []
        self.news: list[tuple[tuple[str, int], ...]] = []
        self.client = EngineClient(self._note)
        self.engine, ours = Pipe()
        self.client._connection = ours
        asyncio.get_running_loop().add_reader(ours.fileno(), self.client._read)

    def _note(self) -> None:
        self.reports.append((dict(self.client.held), self.client.failure))
        self.news.append(self.client.held_news)

    async def received(self) -> Any:
        """The client's next message."""
        assert await asyncio.to_thread(self.engine.poll, 5.0), "the client sent nothing"
        return self.engine.recv()

    def say(self, *chunks: TokenChunk, held: tuple[tuple[str, int], ...] = (), gone: tuple[str, ...] = ()) -> None:
        self.engine.send(StepReport(chunks, held, cached_blocks=3, preemptions=2, gone=gone))

    def close(self) -> None:
        ours = self.client._connection
        assert isinstance(ours, Connection)
        asyncio.get_running_loop().remove_reader(ours.fileno())
        self.client._writer.shutdown()
        ours.close()
        self.engine.close()


@pytest.fixture
async def wired() -> AsyncIterator[Wired]:
    made = Wired()
    yield made
    made.close()


def read(wired: Wired, name: str) -> asyncio.Task[list[TokenChunk]]:
    async def all_of() -> list[TokenChunk]:
        return [chunk async for chunk in wired.client.generate(request(name))]

    return asyncio.create_task(all_of())


async def test_what_comes_together_goes_in_one_message(wired: Wired) -> None:
    readers = [read(wired, name) for name in "abc"]
    message = await wired.received()
    assert [each.request_id for each in message.submit] == ["a", "b", "c"]
    assert not wired.engine.poll()
    wired.say(*(TokenChunk(name, (7,), finish_reason="length") for name in "abc"))
    assert [len(chunks) for chunks in await asyncio.gather(*readers)] == [1, 1, 1]


async def test_each_stream_gets_its_own_chunks(wired: Wired) -> None:
    a, b = read(wired, "a"), read(wired, "b")
    await wired.received()
    wired.say(TokenChunk("a", (1,)), TokenChunk("b", (2,)), TokenChunk("gone", (9,)), held=(("a", 4), ("b", 1)))
    wired.say(TokenChunk("b", (3,), finish_reason="stop"), held=(("a", 5),), gone=("b",))
    wired.say(TokenChunk("a", (5,), finish_reason="length"), gone=("a",))
    assert [chunk.token_ids for chunk in await a] == [(1,), (5,)]
    assert [chunk.token_ids for chunk in await b] == [(2,), (3,)]
    assert wired.reports == [({"a": 4, "b": 1}, None), ({"a": 5}, None), ({}, None)]
    assert wired.news == [(("a", 4), ("b", 1)), (("a", 5),), ()]
    assert (wired.client.cached_blocks, wired.client.preemptions) == (3, 2)


async def test_a_reader_that_fell_behind_gets_what_it_missed_as_one_chunk(wired: Wired) -> None:
    stream = wired.client.generate(request("a"))
    first = asyncio.create_task(anext(stream))
    await wired.received()
    wired.say(TokenChunk("a", (1,), cached_tokens=4))
    assert await first == TokenChunk("a", (1,), cached_tokens=4)
    for token in (2, 3):
        wired.say(TokenChunk("a", (token,)))
    wired.say(TokenChunk("a", (4,), finish_reason="stop"))
    wired.say(TokenChunk("a"))  # to nobody: "a" has ended
    while len(wired.reports) < 5:
        await asyncio.sleep(0.01)
    assert [chunk async for chunk in stream] == [TokenChunk("a", (2, 3, 4), finish_reason="stop")]


async def test_tokens_that_come_too_fast_are_joined_and_none_is_kept(
    wired: Wired, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last ones go by themselves: no later report pushes them out."""
    monkeypatch.setattr(outbox, "CHUNKS_PER_S", 4)
    stream = wired.client.generate(request("a"))
    first = asyncio.create_task(anext(stream))
    await wired.received()
    for token in (1, 2, 3):
        wired.say(TokenChunk("a", (token,)))
    assert (await first).token_ids == (1,), "the first is never held back"
    while len(wired.reports) < 3:
        await asyncio.sleep(0.01)
    assert (await asyncio.wait_for(anext(stream), 10.0)).token_ids == (2, 3)
    wired.say(TokenChunk("a", (4,)))
    wired.say(TokenChunk("a", (5,), finish_reason="stop"))
    assert [chunk async for chunk in stream] == [TokenChunk("a", (4, 5), finish_reason="stop")]


async def test_a_chunk_that_is_due_sooner_does_not_wait_for_another_streams_time(
    wired: Wired, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "CHUNKS_PER_S", 0.001)
    late, soon = (wired.client.generate(request(name)) for name in ("late", "soon"))
    firsts = [asyncio.create_task(anext(stream)) for stream in (late, soon)]
    await wired.received()
    wired.say(TokenChunk("late", (1,)))
    wired.say(TokenChunk("late", (2,)))
    assert (await firsts[0]).token_ids == (1,)
    while len(wired.reports) < 2:
        await asyncio.sleep(0.01)
    monkeypatch.setattr(outbox, "CHUNKS_PER_S", 4)  # as if most streams had ended
    wired.say(TokenChunk("soon", (1,)))
    wired.say(TokenChunk("soon", (2,)))
    assert (await firsts[1]).token_ids == (1,)
    assert (await asyncio.wait_for(anext(soon), 10.0)).token_ids == (2,)
    wired.say(TokenChunk("late", (3,), finish_reason="stop"))
    assert [chunk.token_ids async for chunk in late] == [(2, 3)]
    await soon.aclose()


async def test_who_leaves_is_aborted_once_and_who_ended_is_not(wired: Wired) -> None:
    leaves, ends = read(wired, "leaves"), read(wired, "ends")
    await wired.received()
    wired.say(TokenChunk("ends", (1,), finish_reason="stop"))
    await ends
    leaves.cancel()
    assert await wired.received() == Commands(abort=("leaves",))
    assert not wired.engine.poll()


async def test_a_full_pipe_does_not_hold_up_the_event_loop(wired: Wired) -> None:
    """The engine reads nothing while it computes a step."""

    def read_late() -> Any:
        time.sleep(1.0)
        return wired.engine.recv()

    long = request("long", [1] * 1_000_000)  # more than a pipe holds
    with ThreadPoolExecutor(1) as pool:
        late, began = pool.submit(read_late), time.monotonic()
        stream = wired.client.generate(long)
        first = asyncio.create_task(anext(stream))
        await asyncio.sleep(0.05)
        assert time.monotonic() - began < 0.8
        assert (await asyncio.wrap_future(late)).submit == (long,)
    wired.say(TokenChunk("long", (1,), finish_reason="length"))
    assert (await first).token_ids == (1,)
    await stream.aclose()


async def test_what_the_engine_says_last_ends_every_stream(wired: Wired) -> None:
    readers = [read(wired, name) for name in "ab"]
    await wired.received()
    wired.engine.send(Failed("RuntimeError: CUDA error"))
    for (chunk,) in await asyncio.gather(*readers):
        assert (chunk.finish_reason, chunk.error) == ("error", LOST + "RuntimeError: CUDA error")
    assert wired.reports[-1] == ({}, "RuntimeError: CUDA error")
    assert wired.news[-1] == ()
    (after,) = await read(wired, "after")
    assert after.finish_reason == "error"
    assert not wired.engine.poll(), "nothing is sent to an engine that is gone"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (3, ["exit code 3", "log"]),
        (-signal.SIGKILL, ["SIGKILL", "out of memory"]),
        (-signal.SIGSEGV, ["SIGSEGV"]),
    ],
)
def test_how_a_process_ended(code: int, words: list[str]) -> None:
    assert all(word in _how_it_ended(code) for word in words)
    assert ("memory" in _how_it_ended(code)) == (code == -signal.SIGKILL)
