"""A Dispatcher that plays a script, and remembers what was asked of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field

from deployments.errors import RequestError
from deployments.metrics.board import Observation
from deployments.protocol import FinishReason, GenerationRequest, TokenChunk, TokenLogprob


@dataclass(frozen=True)
class Script:
    """What happens to one request."""

    chunks: Sequence[TokenChunk] = ()
    refusal: RequestError | None = None
    grant_after_s: float = 0.0
    step_s: float = 0.0
    """Pause before each chunk."""
    release_s: float = 0.0
    """How long a release takes."""
    failure: Exception | None = None
    """Raised after the last chunk: a breach of the contract, or a bug."""


@dataclass
class FakeDispatcher:
    """Plays `script`, which may depend on the request."""

    script: Script | Callable[[GenerationRequest], Script]
    ready: bool = True
    observation: Observation | None = None
    max_context: int | None = None
    living_contexts: dict[str, int] = field(default_factory=dict)
    ledger_answered: bool = False
    pool_contexts: dict[str, int] = field(default_factory=dict)
    requests: list[GenerationRequest] = field(default_factory=list)
    wait_limits: list[float] = field(default_factory=list)
    running: set[str] = field(default_factory=set)
    """Ids of the requests that hold a grant."""
    released: list[str] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    """Those released before their terminal chunk."""

    async def dispatch(self, request: GenerationRequest, *, wait_limit_s: float) -> AsyncGenerator[TokenChunk, None]:
        self.requests.append(request)
        self.wait_limits.append(wait_limit_s)
        script = self.script if isinstance(self.script, Script) else self.script(request)
        await asyncio.sleep(script.grant_after_s)
        if script.refusal is not None:
            raise script.refusal
        chunks = self._play(request.request_id, script)
        await anext(chunks)
        return chunks

    async def observe(self) -> Observation | None:
        return self.observation

    def context_of(self, pool: str) -> int | None:
        return self.pool_contexts.get(pool)

    def living_context(self, pool: str | None) -> int | None:
        return max((tokens for name, tokens in self.living_contexts.items() if pool in (None, name)), default=None)

    async def is_ready(self) -> bool:
        return self.ready

    async def _play(self, request_id: str, script: Script) -> AsyncGenerator[TokenChunk, None]:
        self.running.add(request_id)
        ended = False
        try:
            yield TokenChunk(request_id)  # Taken up: consumed by `dispatch`, so that the `finally` below will run.
            for chunk in script.chunks:
                await asyncio.sleep(script.step_s)
                ended = chunk.finish_reason is not None
                yield chunk._replace(request_id=request_id)
            if script.failure is not None:
                raise script.failure
        finally:
            await asyncio.sleep(script.release_s)
            self.running.discard(request_id)
            self.released.append(request_id)
            if not ended:
                self.cancelled.append(request_id)


def chunks_of(
    ids: Sequence[int],
    *,
    finish: FinishReason = "stop",
    per_chunk: int = 1,
    logprobs: bool = False,
    cached_tokens: int = 0,
) -> list[TokenChunk]:
    """`ids` in chunks, the last of them terminal. A token's log-probability is minus a hundredth of its id."""
    parts = [tuple(ids[i : i + per_chunk]) for i in range(0, len(ids), per_chunk)] or [()]
    return [
        TokenChunk(
            "",
            part,
            tuple(TokenLogprob(t, -t / 100, ((t, -t / 100), (t + 1, -t / 50))) for t in part) if logprobs else (),
            finish if i == len(parts) - 1 else None,
            cached_tokens=cached_tokens if i == 0 else 0,
        )
        for i, part in enumerate(parts)
    ]
