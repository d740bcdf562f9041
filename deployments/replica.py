"""A replica: the Serve deployment that plans, loads, and serves one engine; its health, reports and drain."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments import store
from deployments.engine.client import EngineClient
from deployments.engine.messages import EngineSpec
from deployments.errors import EngineFailed
from deployments.home import state_folder
from deployments.metrics.pacing import OUTLINE_EVERY_S, seldom
from deployments.metrics.replica import vitals_of
from deployments.metrics.vitals import ReplicaVitals
from deployments.protocol import REFUSED, GenerationRequest, TokenChunk, mismatch
from deployments.routing.admission import Admission
from deployments.routing.reports import ReportSender
from deployments.settings import ModelSettings, PoolSettings
from deployments.stopping import stop_flag
from placement.outline import outline
from placement.plan import Plan

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """What a replica tells a person or a test that asks it directly."""

    replica_id: str
    engine_pid: int | None
    plan: Plan
    attention: str
    held_blocks: int
    cached_blocks: int
    requests: int
    preemptions: int


class Replica:
    """One engine on one group of devices.

    Args:
        model: the served model.
        pool: this replica's pool.
        replicas_here: replicas that share this machine's cores, for the default thread count.
        ledger: where reports go.
    """

    def __init__(
        self, model: ModelSettings, pool: PoolSettings, replicas_here: int, ledger: DeploymentHandle[Any]
    ) -> None:
        self._model, self._pool, self._replicas_here, self._ledger = model, pool, replicas_here, ledger
        self._engine = EngineClient(self._note_step)
        self._requests: dict[str, str] = {}
        """Engine request id -> grant id, of requests taken up and not ended."""
        self._admission: Admission | None = None
        self._plan: Plan | None = None
        self._outline_when_due = seldom(lambda: outline(self._planned()), OUTLINE_EVERY_S)
        self._attention = ""
        self._sender: ReportSender | None = None
        self._reporting: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Fetch, plan, load, and begin to report.

        Raises:
            ConfigError: one line that says what does not fit or work.
        """
        local = await asyncio.to_thread(
            store.fetch, self._model.source, revision=self._model.revision, home=state_folder()
        )
        cache_dir = state_folder() / "quantized"
        granule_tokens = self._model.granule_tokens
        spec = EngineSpec(
            self._model.name,
            local.path,
            self._pool,
            self._replicas_here,
            cache_dir,
            kernels_dir=state_folder() / "kernels",
            granule_tokens=granule_tokens,
        )
        started = await self._engine.start(spec)
        plan = started.plan
        self._plan, self._attention = plan, started.attention
        context = serve.get_replica_context()
        self._admission = Admission(
            replica_id=context.replica_id.unique_id,
            pool=self._pool.name,
            epoch=time.time_ns(),
            block_size=plan.block_size,
            capacity_blocks=plan.num_blocks,
            max_context=plan.max_context,
            max_requests=self._pool.max_requests,
        )
        log.info(
            "%s/%s loaded in %.1f s, %d KV tokens",
            self._model.name,
            self._pool.name,
            started.load_s,
            plan.capacity_tokens,
        )
        self._sender = ReportSender(self._admission, self._ledger, vitals=seldom(self._vitals), stopping=stop_flag())
        self._reporting = asyncio.get_running_loop().create_task(self._sender.run())

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        """Take the request up and stream its chunks.

        The first chunk is empty and says that the grant was taken up, or is terminal and says why not (`REFUSED`).
        """
        reason = self._reason_against(request)
        if reason is not None:
            yield TokenChunk(request.request_id, finish_reason="error", error=REFUSED + reason)
            return
        assert request.grant is not None
        admission, grant_id, produced = self._admitted(), request.grant.grant_id, 0
        self._requests[request.request_id] = grant_id
        stream = self._engine.generate(request)
        try:
            yield TokenChunk(request.request_id)
            async for chunk in stream:
                produced += len(chunk.token_ids)
                yield chunk
        finally:
            await stream.aclose()
            del self._requests[request.request_id]
            self._note_shared()
            admission.end(
                grant_id, prompt_tokens=request.prompt_tokens, output_tokens=request.resumed_tokens + produced
            )

    async def status(self) -> ReplicaStatus:
        """Who and how this replica is."""
        return ReplicaStatus(
            replica_id=self._admitted().replica_id,
            engine_pid=self._engine.pid,
            plan=self._planned(),
            attention=self._attention,
            held_blocks=sum(self._engine.held.values()) - self._engine.shared_blocks,
            cached_blocks=self._engine.cached_blocks,
            requests=len(self._requests),
            preemptions=self._engine.preemptions,
        )

    async def awake(self) -> None:
        """Answers as soon as there is a replica: a call that waits for one makes Serve start it."""

    async def record_autoscaling_stats(self) -> dict[str, int]:
        """Asked by Serve where the pool scales; see `routing.autoscaling`."""
        assert self._sender is not None, "start() comes first"
        return self._sender.demand()

    async def check_health(self) -> None:
        """Serve restarts the replica when this raises.

        Raises:
            EngineFailed: the engine process is gone.
        """
        if self._engine.failure is not None:
            raise EngineFailed(self._engine.failure)
        if self._reporting is not None and self._reporting.done():
            self._reporting.result()

    def stop(self) -> None:
        """End reports and the engine process."""
        if self._reporting is not None:
            self._reporting.cancel()
        self._engine.stop()

    def _vitals(self) -> ReplicaVitals:
        engine = self._engine
        return vitals_of(
            engine.tally,
            self._planned(),
            cached_blocks=engine.cached_blocks,
            preemptions=engine.preemptions,
            grants=self._admitted().grants,
            outline=self._outline_when_due(),
        )

    def _planned(self) -> Plan:
        assert self._plan is not None, "start() comes first"
        return self._plan

    def _admitted(self) -> Admission:
        assert self._admission is not None, "start() comes first"
        return self._admission

    def _reason_against(self, request: GenerationRequest) -> str | None:
        if (reason := mismatch(request, "this replica")) is not None:
            return reason
        if self._engine.failure is not None:
            return f"the engine failed: {self._engine.failure}"
        if request.request_id in self._requests:
            return f"request {request.request_id} is running here already"
        return self._admitted().take_up(request.grant, time.time())

    def _note_step(self) -> None:
        if self._engine.failure is not None and self._admission is not None:
            self._admission.drain()  # until Serve has noticed and replaced this replica, nothing more may come here
        for request_id, blocks in self._engine.held_news:
            grant_id = self._requests.get(request_id)
            if grant_id is not None:
                self._admitted().hold(grant_id, blocks)
        self._note_shared()
        if self._admission is not None:
            self._admission.note_granules(self._engine.granules)
            self._admission.preemptions = self._engine.preemptions

    def _note_shared(self) -> None:
        """Tell what requests share. The engine may count one that has ended here already: nobody shares with that."""
        if self._admission is not None:
            shared = self._engine.shared_blocks
            if shared:
                shared -= sum(blocks for key, blocks in self._engine.held.items() if key not in self._requests)
            self._admission.share(max(0, shared))


class ReplicaDeployment(Replica):
    """`Replica` as Serve constructs it: ready once the constructor returns."""

    async def __init__(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[misc]  # Serve awaits it
        super().__init__(*args, **kwargs)
        await self.start()

    async def __del__(self) -> None:
        self.stop()
