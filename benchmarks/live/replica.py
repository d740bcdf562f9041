"""A Serve replica that computes nothing: the simulation's replica in real time behind the service's own admission.

With a ledger it takes up grants and reports as `deployments.replica` does. Without one it takes every request, as a
deployment does that Serve routes to by itself, queues it, and refuses it by the limits of `benchmarks.routing.front`.
A request's seed is the number of tokens that it will produce, which no router looks at.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import ray
from ray import serve

from benchmarks.live.fleet import Rules
from benchmarks.live.observer import Look
from benchmarks.live.pace import Pace
from benchmarks.routing.fleet import ReplicaSpec
from benchmarks.routing.job import Job
from deployments.protocol import REFUSED, GenerationRequest, TokenChunk
from deployments.routing.admission import Admission
from deployments.routing.policy import blocks_for
from deployments.routing.reports import ReportSender
from deployments.stopping import stop_flag

TICK_S = 0.02
FLUSH_S = 0.5
"""A stream's tokens are sent together this often, the first at once: the cores are for routing, not for tokens."""
SHOW_S = 0.05
TOKEN = 81
"""A token of the embedded model's tokenizer that is text by itself ("a")."""


@dataclass(slots=True)
class Open:
    """A request that was taken up and has not ended."""

    job: Job
    request: GenerationRequest
    grant_id: str
    granted: int
    """Blocks of the grant, or of the prompt."""
    since: float
    chunks: asyncio.Queue[TokenChunk]
    sent: int = 0
    flushed: float = 0.0
    held: int = 0


class PacedReplica:
    """One replica of one pool.

    Args:
        pool: its name.
        specs: of the pool's replicas, by rank.
        rules: of the run.
        ledger: handle of it; None where Serve routes.
        observer: name of the actor that looks go to.
    """

    def __init__(
        self, pool: str, specs: Sequence[ReplicaSpec], rules: Rules, ledger: Any | None, observer: str
    ) -> None:
        context = serve.get_replica_context()
        self._pool, self._rules, self._granting = pool, rules, ledger is not None
        self._pace = Pace(specs[context.rank.rank])
        self._epoch, self._numbers = time.monotonic(), count()
        self._open: dict[int, Open] = {}
        self._taken_up = self._over = self._most_over = 0
        spec = self._pace.spec
        self._admission = Admission(
            replica_id=context.replica_id.unique_id,
            pool=pool,
            epoch=time.time_ns(),
            block_size=spec.block_size,
            capacity_blocks=spec.capacity_blocks,
            max_context=spec.capacity_tokens,
        )
        self._observer = ray.get_actor(observer, namespace="headroom")
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._keep_pace()), loop.create_task(self._show())]
        if ledger is not None:
            self._tasks.append(loop.create_task(ReportSender(self._admission, ledger, stopping=stop_flag()).run()))

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        """As `deployments.replica.Replica.generate`. A request whose client leaves runs on to its end."""
        reason = self._reason_against(request)
        if reason is not None:
            yield TokenChunk(request.request_id, finish_reason="error", error=REFUSED + reason)
            return
        here = self._take_up(request)
        if self._granting:
            yield TokenChunk(request.request_id)
        while True:
            chunk = await here.chunks.get()
            yield chunk
            if chunk.finish_reason is not None:
                return

    async def check_health(self) -> None:
        """Raises what stopped one of the tasks."""
        for task in self._tasks:
            if task.done():
                task.result()

    def _reason_against(self, request: GenerationRequest) -> str | None:
        if self._granting:
            return self._admission.take_up(request.grant, time.time())
        if self._pace.waiting >= self._rules.queue_limit:
            return f"{self._pace.waiting} requests wait here and the limit is {self._rules.queue_limit}"
        return None

    def _take_up(self, request: GenerationRequest) -> Open:
        now, job_id = self._now(), next(self._numbers)
        self._catch_up(now)
        output = request.sampling.seed - request.resumed_tokens
        job = Job(job_id, now, len(request.prompt_ids), output, request.sampling.max_tokens)
        blocks = request.grant.blocks if request.grant else blocks_for(job.prompt, self._pace.spec.block_size)
        grant_id = request.grant.grant_id if request.grant else ""
        here = Open(job, request, grant_id, blocks, time.monotonic(), asyncio.Queue())
        self._open[job_id] = here
        self._taken_up += 1
        over = self._charged() - self._pace.spec.capacity_blocks
        self._over += over > 0
        self._most_over = max(self._most_over, over)
        self._pace.submit(job, now)
        return here

    async def _keep_pace(self) -> None:
        while True:
            self._catch_up(self._now())
            await asyncio.sleep(TICK_S)

    def _catch_up(self, now: float) -> None:
        ended = self._pace.catch_up(now)
        progress = self._pace.progress()
        for job in ended:
            self._finish(self._open.pop(job.index))
        for job_id, here in list(self._open.items()):
            produced, held = progress[job_id]
            self._note_held(here, held)
            self._emit(here, produced)
            if not self._granting and produced == 0:
                self._give_up_if_late(here)

    def _note_held(self, here: Open, blocks: int) -> None:
        if self._granting and blocks != here.held:
            self._admission.hold(here.grant_id, blocks)
        here.held = blocks

    def _emit(self, here: Open, produced: int) -> None:
        now = time.monotonic()
        if produced > here.sent and (here.sent == 0 or now - here.flushed >= FLUSH_S):
            here.chunks.put_nowait(TokenChunk(here.request.request_id, (TOKEN,) * (produced - here.sent)))
            here.sent, here.flushed = produced, now

    def _finish(self, here: Open) -> None:
        rest = (TOKEN,) * (here.job.output - here.sent)
        here.chunks.put_nowait(TokenChunk(here.request.request_id, rest, finish_reason="stop"))
        if self._granting:
            output = here.request.resumed_tokens + here.job.output
            self._admission.end(here.grant_id, prompt_tokens=here.request.prompt_tokens, output_tokens=output)

    def _give_up_if_late(self, here: Open) -> None:
        if time.monotonic() - here.since > self._rules.wait_limit_s and self._pace.withdraw(here.job):
            del self._open[here.job.index]
            reason = f"{REFUSED}no room within {self._rules.wait_limit_s:g} s"
            here.chunks.put_nowait(TokenChunk(here.request.request_id, finish_reason="error", error=reason))

    def _now(self) -> float:
        return (time.monotonic() - self._epoch) / self._rules.slow

    def _charged(self) -> int:
        return sum(max(here.granted, here.held) for here in self._open.values())

    async def _show(self) -> None:
        """Tell the observer, one look at a time."""
        while True:
            await self._observer.see.remote(self._look())
            await asyncio.sleep(SHOW_S)

    def _look(self) -> Look:
        return Look(
            replica_id=self._admission.replica_id,
            pool=self._pool,
            capacity=self._pace.spec.capacity_blocks,
            granted=sum(here.granted for here in self._open.values()),
            held=self._pace.used_blocks,
            charged=self._charged(),
            taken_up=self._taken_up,
            over_at_take_up=self._over,
            most_over=self._most_over,
            preemptions=self._pace.preemptions,
        )
