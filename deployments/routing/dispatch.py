"""From the ingress to a replica and back: reserve, send, stream, try again, resume.

One HTTP request may dispatch many choices at once; each has its own grant. Each ends in exactly one terminal chunk,
or by the caller's `aclose()` or cancellation. A replica that is lost costs its requests time and no token: each is
sent again with all that it has produced, and goes on where it was.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.exceptions import ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from deployments.errors import BadRequest, ContextLengthExceeded, NoReplica, Overloaded, RequestError
from deployments.granules import prefix_of
from deployments.metrics.board import Observation
from deployments.metrics.vitals import IngressVitals
from deployments.protocol import (
    LOCAL_EPOCH,
    GenerationRequest,
    Grant,
    LedgerNews,
    Prefix,
    Refusal,
    ReserveRequest,
    TokenChunk,
)
from deployments.routing.attempt import Attempt, Lost, NotTakenUp, Refused
from deployments.routing.calls import CallFailed, NotSent, answer_of, method_of
from deployments.routing.contexts import Contexts
from deployments.routing.local import LocalPlacement
from deployments.routing.notices import NoticeSender
from deployments.routing.progress import Progress
from deployments.routing.view import LedgerView

logger = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 1.0
READY_LIMIT_S = 2.0
LEDGER_LIMIT_S = 2.0
MAX_LOSSES = 3
"""Replicas that one request may lose. A request that kills what it runs on must not go through them all."""
LOCAL_RETRY_AFTER_S = 5
"""What a client is told to wait when replicas are full and no ledger knows for how long: a ledger restarts in less."""


class ServeDispatcher:
    """Dispatches the requests of one model from one ingress process.

    Args:
        model: its name, for messages.
        ingress_id: unique among the ingress processes.
        ledger: handle of the model's ledger.
        pools: pool name -> handle of its deployment, whose router is `GrantRouter`.
        vitals: what to tell of this ingress with the next notice, if anything.
        ledger_limit_s: a ledger that gives no sign for this long is done without.
        granule_tokens: by which prompts are looked for in the replicas' prefix caches; None: they are not.
        rng: for choices that the ledger doesn't make.
    """

    def __init__(
        self,
        model: str,
        ingress_id: str,
        ledger: DeploymentHandle[Any],
        pools: Mapping[str, DeploymentHandle[Any]],
        *,
        vitals: Callable[[], IngressVitals | None] = lambda: None,
        ledger_limit_s: float = LEDGER_LIMIT_S,
        granule_tokens: int | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._model = model
        self._granule_tokens = granule_tokens
        self._ingress_id = ingress_id
        self._ledger = ledger
        self._pools = pools
        self._waking: dict[str, asyncio.Task[None]] = {}
        """By pool, calls that wait for its first replica."""
        self._ledger_reserve = method_of(ledger, "reserve")
        self._pool_generate = {name: method_of(handle, "generate", stream=True) for name, handle in pools.items()}
        self._notices = NoticeSender(ingress_id, ledger, limit_s=ledger_limit_s, on_news=self._hear, vitals=vitals)
        self._local = LocalPlacement(ingress_id, rng or random.Random())
        self._open: set[Attempt] = set()
        self._contexts = Contexts()

    async def dispatch(self, request: GenerationRequest, *, wait_limit_s: float) -> AsyncGenerator[TokenChunk, None]:
        """Wait until a replica has taken the request up; then stream it.

        Args:
            request: one choice, without a grant.
            wait_limit_s: seconds for all of the waiting, retries after lost replicas included; and again as many
                for each replica that is lost later.

        Returns:
            A generator of chunks, the last of which is terminal. `aclose()` cancels the request on its replica.

        Raises:
            RequestError: the request was refused, or no replica took it up in time.
        """
        self._notices.start()
        chunks = self._run(Progress(request), wait_limit_s)
        await anext(chunks)
        return chunks

    def start(self) -> None:
        """Begin to renew the lease; on a running event loop."""
        self._notices.start()

    @property
    def max_context(self) -> int | None:
        """Longest prompt + output in tokens that a replica holds; None until the ledger knew that of each pool."""
        return self._contexts.longest

    def context_of(self, pool: str) -> int | None:
        """The same of one pool."""
        return self._contexts.of(pool)

    def living_context(self, pool: str | None) -> int | None:
        """What each replica of that pool, or of one pool, holds that can take work now; see `Contexts.living`."""
        return self._contexts.living(pool)

    @property
    def ledger_answered(self) -> bool:
        """Whether the ledger ever had a notice of this ingress."""
        return self._notices.news is not None

    async def is_ready(self) -> bool:
        """Whether a replica is known that can take work: by the ledger, or without it by its last news."""
        try:
            view: LedgerView = await answer_of(self._ledger.snapshot.remote(), READY_LIMIT_S)
        except CallFailed as error:
            logger.info("the ledger of %s does not answer: %s", self._model, error)
            return self._local.knows_a_replica
        return view.ready

    async def observe(self) -> Observation | None:
        """What there is to show of this model; None while the ledger does not answer."""
        try:
            seen: Observation = await answer_of(self._ledger.observe.remote(), READY_LIMIT_S)
        except CallFailed as error:
            logger.info("the ledger of %s does not answer: %s", self._model, error)
            return None
        return seen

    async def close(self) -> None:
        """Send what is left to tell and stop the background tasks."""
        self._keep_waking(())
        await self._notices.close()

    async def _run(self, progress: Progress, wait_limit_s: float) -> AsyncGenerator[TokenChunk, None]:
        """All attempts of a request. The first item says that a replica took it up; a RequestError comes before it."""
        attempt = await self._place(progress, wait_limit_s)
        try:
            yield TokenChunk(progress.request.request_id)
            while True:
                try:
                    chunk = progress.note(await attempt.read(), attempt.grant.pool)
                except Lost as loss:
                    self._close(attempt, loss)
                    resumed = await self._resume(progress, attempt.grant, loss, wait_limit_s)
                    if isinstance(resumed, TokenChunk):
                        yield resumed
                        return
                    attempt = resumed
                    continue
                yield chunk
                if chunk.finish_reason is not None:
                    return
        finally:
            self._close(attempt)

    async def _resume(self, progress: Progress, grant: Grant, loss: Lost, wait_limit_s: float) -> Attempt | TokenChunk:
        """Another attempt after a loss, or the chunk that says why there is none."""
        progress.losses += 1
        progress.resumes = True
        done = f"replica {grant.replica_id} failed after {len(progress.produced)} tokens: {loss}"
        logger.warning("request %s: %s", progress.request.request_id, done)
        if progress.losses > MAX_LOSSES:
            why = f"{progress.losses} replicas failed while they ran this request, and it is not tried on more"
        else:
            try:
                return await self._place(progress, wait_limit_s)
            except RequestError as error:
                why = f"it could not be resumed: {error.message}"
        text = f"{done}. {why[0].upper() + why[1:]}. Send the request again"
        return TokenChunk(progress.request.request_id, finish_reason="error", error=text)

    async def _place(self, progress: Progress, wait_limit_s: float) -> Attempt:
        """Reserve and send until a replica takes the request up.

        Raises:
            RequestError: it was refused, or none took it up within `wait_limit_s`.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + wait_limit_s
        pause = FIRST_PAUSE_S
        while True:
            request = progress.next_attempt()
            try:
                grant = await self._reserve(self._wish(request, progress, max(0.0, deadline - loop.time())))
                return await self._send(replace(request, grant=grant), grant)
            except NotTakenUp as reason:
                progress.resumes |= reason.lost
                logger.warning("request %s was not taken up and is tried again: %s", request.request_id, reason)
                if loop.time() + pause >= deadline:
                    raise self._given_up(reason, wait_limit_s) from None
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def _prefix(self, request: GenerationRequest) -> Prefix | None:
        if self._granule_tokens is None:
            return None
        return prefix_of(request.prompt_ids, request.salt, self._granule_tokens)

    def _wish(self, request: GenerationRequest, progress: Progress, wait_limit_s: float) -> ReserveRequest:
        return ReserveRequest(
            request_id=request.request_id,
            ingress_id=self._ingress_id,
            prompt_tokens=len(request.prompt_ids),
            max_tokens=request.sampling.max_tokens - request.resumed_tokens,
            wait_limit_s=wait_limit_s,
            pool=progress.pool or request.pool,
            tenant=request.tenant,
            priority=request.priority,
            prefix=self._prefix(request),
            weight=request.weight,
            resumes=progress.resumes,
        )

    async def _reserve(self, wish: ReserveRequest) -> Grant:
        try:
            async with self._notices.while_there():
                answer = await self._ask(wish)
        except CallFailed as error:
            self._notices.probe()
            return self._place_locally(wish, error)
        if isinstance(answer, Refusal):
            raise error_of(answer)
        return answer

    async def _ask(self, wish: ReserveRequest) -> Grant | Refusal:
        """The ledger's answer. Whatever keeps it from here, the ledger learns that nobody waits for it any more."""
        answered = False
        try:
            answer = await answer_of(self._ledger_reserve.remote(wish))
            answered = True
        finally:
            if not answered:
                self._notices.cancelled(wish.request_id)
        if not isinstance(answer, Grant | Refusal):
            raise TypeError(f"the ledger answered with a {type(answer).__name__}, not a Grant or Refusal")
        return answer

    def _place_locally(self, wish: ReserveRequest, error: CallFailed) -> Grant:
        grant = self._local.place(wish, time.time())
        if grant is None:
            raise NotTakenUp(f"the ledger of {self._model} is gone ({error}), and no replica is known that could serve")
        return grant

    async def _send(self, request: GenerationRequest, grant: Grant) -> Attempt:
        """Send the request where its grant says.

        Raises:
            NotTakenUp: the replica refused it or was lost.
        """
        attempt = Attempt(request, grant, self._pool_generate[grant.pool].remote(request))
        self._open.add(attempt)
        taken_up = False
        try:
            await attempt.take_up()
            taken_up = True
        except Refused as reason:
            local = grant.ledger_epoch == LOCAL_EPOCH
            if not local:
                self._notices.unused(grant.grant_id)
            raise NotTakenUp(str(reason), busy=local or reason.busy) from None
        except Lost as loss:
            self._note_loss(grant, loss.cause)
            raise NotTakenUp(f"replica {grant.replica_id} was lost: {loss}", lost=True) from loss
        except asyncio.CancelledError:  # the call may arrive there all the same
            if grant.ledger_epoch != LOCAL_EPOCH:
                self._notices.left(grant.grant_id)
            raise
        finally:
            if not taken_up:
                self._close(attempt)
        return attempt

    def _close(self, attempt: Attempt, loss: Lost | None = None) -> None:
        """The attempt is over; any number of times."""
        attempt.close()
        self._open.discard(attempt)
        self._local.ended(attempt.grant.grant_id)
        if loss is not None:
            self._note_loss(attempt.grant, loss.cause)

    def _note_loss(self, grant: Grant, cause: Exception | None) -> None:
        """Tell the ledger what an error says about a grant and its replica."""
        if isinstance(cause, NotSent):
            self._notices.unused(grant.grant_id)
        if isinstance(cause, (ReplicaUnavailableError, RayActorError)):
            self._notices.lost(grant.replica_id, grant.replica_epoch)
            self._local.lost(grant.replica_id)

    def _hear(self, news: LedgerNews) -> None:
        """Take in the ledger's news; streams on replicas that fell silent are resumed elsewhere."""
        self._local.hear(news)
        self._contexts.hear(news)
        self._keep_waking(news.wake)
        silent = set(news.silent)
        for attempt in list(self._open):
            if (attempt.grant.replica_id, attempt.grant.replica_epoch) in silent:
                attempt.abandon("its heartbeats stopped")

    def _keep_waking(self, wanted: Collection[str]) -> None:
        """Have one call wait at each pool that is to get its first replica: Serve starts one for it.

        Called from the task that sends notices, whose context is empty: the calls are no client's.
        """
        for pool in [pool for pool, task in self._waking.items() if pool not in wanted or task.done()]:
            self._waking.pop(pool).cancel()
        for pool in wanted:
            if pool not in self._waking:
                self._waking[pool] = asyncio.get_running_loop().create_task(self._wake(pool))

    async def _wake(self, pool: str) -> None:
        logger.info("requests wait for a first replica of %s/%s", self._model, pool)
        try:
            await answer_of(self._pools[pool].awake.remote())
        except CallFailed as error:
            logger.warning("no replica of %s/%s came: %s", self._model, pool, error)

    def _given_up(self, reason: NotTakenUp, wait_limit_s: float) -> RequestError:
        text = f"no replica of {self._model} took the request up within {wait_limit_s:g} s; last: {reason}"
        return Overloaded(text, retry_after_s=LOCAL_RETRY_AFTER_S) if reason.busy else NoReplica(text)


def error_of(refusal: Refusal) -> RequestError:
    """The exception that a refusal is to the client."""
    match refusal.kind:
        case "too_long":
            return ContextLengthExceeded(refusal.message)
        case "queue_full" | "deadline":
            return Overloaded(refusal.message, retry_after_s=refusal.retry_after_s)
        case "no_replica" | "version":
            return NoReplica(refusal.message, retry_after_s=refusal.retry_after_s)
        case "unknown_pool":
            return BadRequest(refusal.message, param="pool")
