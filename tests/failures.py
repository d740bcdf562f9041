"""What a replica sees when its engine fails, on whatever device: used by the tests of each."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from deployments.engine import client as client_module
from deployments.engine.client import EngineClient
from deployments.engine.messages import EngineSpec
from deployments.protocol import LOST, GenerationRequest, Sampling, TokenChunk
from tests.waiting import gone, until

PROMPT = tuple(range(3, 23))
LONG = 3000
"""Output tokens of requests that a fault interrupts: it comes after their first tokens."""
_LIMIT_S = 60.0


class Faulty:
    """An engine process whose faults come when they are called."""

    def __init__(self, client: EngineClient, fault: Path, reports: list[str | None]) -> None:
        self.client, self._fault, self._reports = client, fault, reports

    def strike(self, fault: str) -> None:
        """From now on; the engine reads the name whole or not at all."""
        named = self._fault.with_suffix(".new")
        named.write_text(fault)
        named.rename(self._fault)

    def heal(self) -> None:
        """No fault strikes any more."""
        self._fault.unlink()

    async def ask(self, name: str, tokens: int) -> list[TokenChunk]:
        """A greedy request, to its end."""
        sampling = Sampling(max_tokens=tokens, seed=1, temperature=0.0)
        return [chunk async for chunk in self.client.generate(GenerationRequest(name, PROMPT, sampling, salt=name))]

    async def struck(self, fault: str) -> list[TokenChunk]:
        """The last chunks of three requests that run when `fault` strikes."""
        readers = [asyncio.create_task(self.ask(f"{fault}{i}", LONG)) for i in range(3)]
        await until(lambda: len(self.client.held) == 3)
        self.strike(fault)
        done = await asyncio.wait_for(asyncio.gather(*readers), _LIMIT_S)
        for chunks in done:
            assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
            assert chunks[-1].finish_reason == "error"
        return [chunks[-1] for chunks in done]

    async def ends(self, fault: str, reason: str) -> None:
        """The fault ends the process, all its requests, and what comes later; the replica is told, and of no block."""
        last = await self.struck(fault)
        failure = self.client.failure
        assert failure is not None
        assert reason in failure
        assert {chunk.error for chunk in last} == {LOST + failure}
        assert self.client.held == {}
        assert self._reports[-1] == failure, "the replica is told, and its health check fails"
        (after,) = await self.ask("after", 4)
        assert (after.finish_reason, after.error) == ("error", LOST + failure)
        await until(lambda: gone(self.client.pid))

    async def survives_nan(self) -> None:
        """Requests end alone; afterwards the engine is as good as new."""
        good = _ids(await self.ask("good", 12))
        for chunk in await self.struck("nan"):
            assert "not finite" in str(chunk.error)
        assert self.client.failure is None
        await until(lambda: not self.client.held)
        self.heal()
        assert {_ids(await self.ask(f"again{i}", 12)) for i in range(4)} == {good}  # alone, as GPUs round by the batch


@asynccontextmanager
async def faulty(spec: EngineSpec, folder: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Faulty]:
    """An engine process of `spec`; `folder` takes what calls its faults."""
    start, fault = subprocess.Popen, folder / "fault"

    def started(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        command = ["tests.failing_engine" if part == "deployments.engine.process" else part for part in command]
        options["env"] = options["env"] | {"FAULT": str(fault)}
        return start(command, **options)

    monkeypatch.setattr(client_module.subprocess, "Popen", started)
    reports: list[str | None] = []
    client = EngineClient(lambda: reports.append(client.failure))
    await client.start(spec)
    try:
        yield Faulty(client, fault, reports)
    finally:
        client.stop()
        await until(lambda: gone(client.pid))


def _ids(chunks: list[TokenChunk]) -> tuple[int, ...]:
    return tuple(token for chunk in chunks for token in chunk.token_ids)
