"""Requests without grants: Serve's own routing, power of two choices, decides where each goes, and it waits there."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from deployments.errors import Overloaded
from deployments.metrics.board import Observation
from deployments.protocol import REFUSED, GenerationRequest, TokenChunk

RETRY_AFTER_S = 1


class DirectDispatcher:
    """A `deployments.api.dispatcher.Dispatcher` over a deployment with Serve's default router.

    Args:
        pool: handle of the deployment.
        max_context: longest prompt + output in tokens.
    """

    def __init__(self, pool: Any, max_context: int) -> None:
        self._stream = pool.options(stream=True)
        self._max_context = max_context

    async def dispatch(self, request: GenerationRequest, *, wait_limit_s: float) -> AsyncGenerator[TokenChunk, None]:
        """Send it, and wait for its first tokens. The replica keeps to the wait limit, which all requests share."""
        del wait_limit_s
        chunks = self._run(request)
        await anext(chunks)
        return chunks

    async def _run(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        """The first item says that the request is in a batch; a refusal is raised before it."""
        call = self._stream.generate.remote(request)
        ended = False
        try:
            first = await anext(aiter(call))
            if first.finish_reason == "error" and (first.error or "").startswith(REFUSED):
                ended = True
                raise Overloaded(first.error or REFUSED, retry_after_s=RETRY_AFTER_S)
            yield TokenChunk(request.request_id)
            yield first
            ended = first.finish_reason is not None
            while not ended:
                chunk = await anext(call)
                ended = chunk.finish_reason is not None
                yield chunk
        finally:
            if not ended:
                call.cancel()

    async def observe(self) -> Observation | None:
        """There is no ledger to ask."""
        return None

    @property
    def max_context(self) -> int | None:
        """Longest prompt + output in tokens."""
        return self._max_context

    @property
    def ledger_answered(self) -> bool:
        """False: there is none."""
        return False

    def living_context(self, pool: str | None) -> int | None:
        """The same: its replicas neither come nor go."""
        del pool
        return self._max_context

    def context_of(self, pool: str) -> int | None:
        """None: it knows of no pools."""
        del pool
        return None

    async def is_ready(self) -> bool:
        """Serve starts the ingress after its replicas."""
        return True
