"""The engine in its own process does what it does in this one, and neither outlives the other unnoticed."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from functools import reduce
from pathlib import Path

import pytest
import pytest_asyncio

from deployments.engine.client import EngineClient
from deployments.engine.loader import load
from deployments.engine.loop import Engine
from deployments.engine.messages import EngineLimits, EngineSpec, Started
from deployments.errors import ConfigError
from deployments.protocol import LOST, GenerationRequest, TokenChunk
from deployments.settings import PoolSettings
from tests.unit.engine.tiny import VOCAB, drain, llama, request, save
from tests.waiting import gone, until

pytestmark = pytest.mark.asyncio(loop_scope="module")
LONG = 3000
"""Output tokens of a request that runs for seconds."""


def spec_of(folder: Path, memory: str = "40MB") -> EngineSpec:
    pool = PoolSettings(
        device="cpu",
        dtype="float32",
        cpu_device_memory=memory,
        block_size=4,
        max_batch_tokens=64,
        max_sequences=16,
        threads=1,
    )
    return EngineSpec("tiny", folder, pool, replicas_here=1, cache_dir=folder.parent / "quantized")


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> EngineSpec:
    return spec_of(save(tmp_path_factory.mktemp("models") / "llama", llama(max_position_embeddings=4096)))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(spec: EngineSpec) -> AsyncIterator[tuple[EngineClient, Started]]:
    client = EngineClient()
    started = await client.start(spec)
    yield client, started
    client.stop()
    await until(lambda: gone(client.pid))


async def all_of(client: EngineClient, each: GenerationRequest) -> list[TokenChunk]:
    return [chunk async for chunk in client.generate(each)]


def some_requests() -> list[GenerationRequest]:
    greedy = [request(f"greedy{i}", range(i, 5 * i + 1), max_tokens=5 + i, logprobs=2) for i in range(6)]
    drawn = [request(f"drawn{i}", (1, 2, 3), temperature=1.0, seed=i, max_tokens=20) for i in range(4)]
    ends = request("ends", (1, 2, 3), temperature=1.0, seed=3, max_tokens=100, end_ids=tuple(range(0, VOCAB, 7)))
    return [*greedy, *drawn, ends]


def whole(chunks: Sequence[TokenChunk]) -> TokenChunk:
    """All of a request's as one: on their way they are joined where they come fast."""
    return reduce(TokenChunk.joined, chunks)


async def test_the_process_says_what_the_engine_says(running: tuple[EngineClient, Started], spec: EngineSpec) -> None:
    client, started = running
    limits = EngineLimits(max_batch_tokens=64, max_sequences=16, prefix_cache=True, threads=1)
    engine = Engine(load(spec.model_dir, started.plan, device_type="cpu"), started.plan, limits)
    for _ in range(2):  # the second time with the prefix cache
        requests = some_requests()
        for each in requests:
            engine.submit(each)
        expected = drain(engine)
        found = await asyncio.gather(*(all_of(client, each) for each in requests))
        assert {each.request_id: whole(chunks) for each, chunks in zip(requests, found, strict=True)} == {
            name: whole(chunks) for name, chunks in expected.items()
        }
        assert {chunks[-1].finish_reason for chunks in found} == {"length", "stop"}
    assert client.cached_blocks == engine.blocks.cached_blocks > 0
    assert client.held == {}


async def test_what_the_engine_refuses_ends_its_stream_alone(running: tuple[EngineClient, Started]) -> None:
    client, _ = running
    wrong, good = await asyncio.gather(
        all_of(client, request("wrong", (VOCAB,))), all_of(client, request("good", max_tokens=3))
    )
    assert [chunk.finish_reason for chunk in wrong] == ["error"]
    assert f"token {VOCAB}" in str(wrong[0].error)
    assert [chunk.finish_reason for chunk in good] == [None, None, "length"]


async def test_leaving_a_stream_early_aborts_its_request(running: tuple[EngineClient, Started]) -> None:
    client, _ = running
    stream = client.generate(request("leaves", max_tokens=LONG))
    assert [(await anext(stream)).finish_reason for _ in range(3)] == [None] * 3
    assert client.held["leaves"] >= 2
    await stream.aclose()
    await until(lambda: not client.held, limit_s=2.0)  # long before it would end by itself


async def test_a_cancelled_reader_aborts_its_request(running: tuple[EngineClient, Started]) -> None:
    client, _ = running
    reader = asyncio.create_task(all_of(client, request("cancelled", max_tokens=LONG)))
    await until(lambda: "cancelled" in client.held)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    await until(lambda: not client.held, limit_s=2.0)  # long before it would end by itself


async def test_ctrl_c_is_the_replicas_to_handle(running: tuple[EngineClient, Started]) -> None:
    client, _ = running
    assert client.pid is not None
    os.kill(client.pid, signal.SIGINT)
    assert len(await all_of(client, request("after", max_tokens=2))) == 2


async def test_a_killed_engine_ends_its_streams_with_an_error(spec: EngineSpec) -> None:
    reports: list[str | None] = []
    client = EngineClient(lambda: reports.append(client.failure))
    await client.start(spec)
    readers = [asyncio.create_task(all_of(client, request(f"r{i}", max_tokens=LONG))) for i in range(3)]
    await until(lambda: len(client.held) == 3)
    assert client.pid is not None
    os.kill(client.pid, signal.SIGKILL)
    for chunks in await asyncio.wait_for(asyncio.gather(*readers), 5.0):
        assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
        assert chunks[-1].finish_reason == "error"
        assert "SIGKILL" in str(chunks[-1].error)
    assert client.failure is not None
    assert "SIGKILL" in client.failure
    assert client.held == {}
    assert reports[-1] == client.failure, "the replica is told"
    (after,) = await all_of(client, request("after"))
    assert (after.finish_reason, after.error) == ("error", LOST + str(client.failure))
    client.stop()


PARENT = """
import asyncio, pickle, sys
from deployments.engine.client import EngineClient

async def main():
    client = EngineClient()
    await client.start(pickle.load(sys.stdin.buffer))
    print(client.pid, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


async def test_the_engine_ends_with_its_parent(spec: EngineSpec) -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        parent.stdin.write(pickle.dumps(spec))
        parent.stdin.close()
        engine = int(await asyncio.to_thread(parent.stdout.readline))
        assert not gone(engine)
        parent.kill()
    await until(lambda: gone(engine))


@pytest.mark.parametrize(
    ("folder", "memory", "reason"),
    [
        ("llama", "200KB", r"^pool default: tiny does not fit: device 0 needs [\d,]+ bytes and has 200,000\."),
        ("nowhere", "40MB", r"^pool default: .*/nowhere does not exist; give a folder"),
    ],
    ids=["does not fit", "no such folder"],
)
async def test_a_start_that_fails_raises_the_engines_reason(
    spec: EngineSpec, folder: str, memory: str, reason: str
) -> None:
    client = EngineClient()
    with pytest.raises(ConfigError, match=reason) as caught:
        await client.start(spec_of(spec.model_dir.parent / folder, memory))
    assert "\n" not in str(caught.value)
    assert client.failure == str(caught.value)
    await until(lambda: gone(client.pid))


async def test_a_process_that_says_nothing_is_told_by_its_exit_code(
    spec: EngineSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ConfigError, match="the engine process ended with exit code 1; its log tells why"):
        await EngineClient().start(spec)


async def test_stopping_waits_for_nothing(spec: EngineSpec) -> None:
    """Not even for an engine that does not react: the replica's event loop has other streams to serve."""
    client = EngineClient()
    start = asyncio.create_task(client.start(spec))
    await until(lambda: client.pid is not None)
    assert client.pid is not None
    os.kill(client.pid, signal.SIGSTOP)
    began = time.monotonic()
    client.stop()
    assert time.monotonic() - began < 0.2
    with pytest.raises(ConfigError, match="the replica is shutting down"):
        await start
    await until(lambda: gone(client.pid))


async def test_a_cancelled_start_ends_the_process(spec: EngineSpec) -> None:
    client = EngineClient()
    start = asyncio.create_task(client.start(spec))
    await until(lambda: client.pid is not None)
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    await until(lambda: gone(client.pid))
    assert client.failure == "its start was cancelled"
