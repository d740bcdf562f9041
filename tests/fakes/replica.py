"""A Serve replica without a model: real admission and reports, invented tokens. For integration tests of routing."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator

from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments.protocol import REFUSED, GenerationRequest, TokenChunk
from deployments.routing.admission import Admission
from deployments.routing.policy import blocks_for
from deployments.routing.reports import ReportSender
from deployments.stopping import stop_flag

BLOCK_SIZE = 16


class FakeReplica:
    """Produces the tokens 1, 2, 3, ..., one each `sampling.seed` milliseconds; resumed, it goes on counting."""

    def __init__(self, ledger: DeploymentHandle, capacity_blocks: int) -> None:
        self._in_use: dict[str, int] = {}
        self._most = 0
        self._served: list[str] = []
        context = serve.get_replica_context()
        self._admission = Admission(
            replica_id=context.replica_id.unique_id,
            pool="default",
            epoch=time.time_ns(),
            block_size=BLOCK_SIZE,
            capacity_blocks=capacity_blocks,
            max_context=capacity_blocks * BLOCK_SIZE,
        )
        self._sender = ReportSender(self._admission, ledger, stopping=stop_flag())
        self._reporting = asyncio.get_running_loop().create_task(self._sender.run())

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        reason = self._admission.take_up(request.grant, time.time())
        if reason is not None:
            yield TokenChunk(request.request_id, finish_reason="error", error=REFUSED + reason)
            return
        assert request.grant is not None
        grant, produced = request.grant, request.resumed_tokens
        self._served.append(request.request_id)
        self._in_use[grant.grant_id] = grant.blocks
        self._most = max(self._most, sum(self._in_use.values()))
        try:
            yield TokenChunk(request.request_id)
            while produced < request.sampling.max_tokens:
                await asyncio.sleep(request.sampling.seed / 1000)
                produced += 1
                self._admission.hold(grant.grant_id, blocks_for(request.prompt_tokens + produced, BLOCK_SIZE))
                last = produced == request.sampling.max_tokens
                yield TokenChunk(request.request_id, (produced,), finish_reason="length" if last else None)
        finally:
            del self._in_use[grant.grant_id]
            self._admission.end(grant.grant_id, prompt_tokens=request.prompt_tokens, output_tokens=produced)

    async def awake(self) -> None:
        pass

    async def record_autoscaling_stats(self) -> dict[str, int]:
        return self._sender.demand()

    async def observe(self) -> tuple[str, int, int, int, int]:
        """(replica id, pid, blocks in use, most blocks ever in use, requests served)."""
        return (
            self._admission.replica_id,
            os.getpid(),
            sum(self._in_use.values()),
            self._most,
            len(self._served),
        )
