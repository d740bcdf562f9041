"""From the ingress to a replica and back: reserve, send, stream, retry, give back.

One HTTP request may dispatch many choices at once; each has its own grant. Each ends in exactly one terminal chunk,
or by the caller's `aclose()` or cancellation.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping
from dataclasses import replace
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.exceptions import ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from deployments.errors import BadRequest, ContextLengthExceeded, EngineFailed, NoReplica, Overloaded, RequestError
from deployments.protocol import REFUSED, GenerationRequest, Grant, Refusal, ReserveRequest, TokenChunk
from deployments.routing.calls import CallFailed, answer_of, cancel, cancelled_here, one_line
from deployments.routing.notices import NoticeSender
from deployments.routing.router import NotSent
from deployments.routing.view import LedgerView

logger = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 1.0
READY_LIMIT_S = 2.0


class NotTakenUp(Exception):
    """The replica refused the grant, or was lost before it took the grant up."""


class ServeDispatcher:
    """Dispatches the requests of one model from one ingress process.

    Args:
        model: its name, for messages.
        ingress_id: unique among the ingress processes.
        ledger: handle of the model's ledger.
        pools: pool name -> handle of its deployment, whose router is `GrantRouter`.
    """

    def __init__(
        self, model: str, ingress_id: str, ledger: DeploymentHandle[Any], pools: Mapping[str, DeploymentHandle[Any]]
    ) -> None:
        self._model = model
        self._ingress_id = ingress_id
        self._ledger = ledger
        self._streams = {name: handle.options(stream=True) for name, handle in pools.items()}
        self._notices = NoticeSender(ingress_id, ledger)

    async def dispatch(self, request: GenerationRequest, *, wait_limit_s: float) -> AsyncGenerator[TokenChunk, None]:
        """Wait until a replica has taken the request up; then stream it.

        Args:
            request: one choice, without a grant.
            wait_limit_s: seconds for all of the waiting, retries after lost replicas included.

        Returns:
            A generator of chunks, the last of which is terminal. `aclose()` cancels the request on its replica.

        Raises:
            RequestError: the request was refused, or no replica took it up in time.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + wait_limit_s
        self._notices.start()
        pause = FIRST_PAUSE_S
        while True:
            try:
                grant = await self._reserve(request, max(0.0, deadline - loop.time()))
                chunks = self._stream(replace(request, grant=grant), grant)
                await anext(chunks)
                return chunks
            except NotTakenUp as reason:
                logger.warning("request %s was not taken up and is tried again: %s", request.request_id, reason)
                if loop.time() + pause >= deadline:
                    raise NoReplica(
                        f"no replica of {self._model} took the request up within {wait_limit_s:g} s; last: {reason}"
                    ) from None
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def start(self) -> None:
        """Begin to renew the lease; on a running event loop."""
        self._notices.start()

    @property
    def max_context(self) -> int | None:
        """Longest prompt + output in tokens that a known replica holds; None while none is known."""
        return self._notices.news.max_context if self._notices.news is not None else None

    async def is_ready(self) -> bool:
        """Whether the ledger answers and knows a replica that can take work."""
        try:
            view: LedgerView = await answer_of(self._ledger.snapshot.remote(), READY_LIMIT_S)
        except CallFailed as error:
            logger.info("the ledger of %s does not answer: %s", self._model, error)
            return False
        return view.ready

    async def close(self) -> None:
        """Send what is left to tell and stop the background task."""
        await self._notices.close()

    async def _reserve(self, request: GenerationRequest, wait_limit_s: float) -> Grant:
        wish = ReserveRequest(
            request_id=request.request_id,
            ingress_id=self._ingress_id,
            prompt_tokens=len(request.prompt_ids),
            max_tokens=request.sampling.max_tokens,
            wait_limit_s=wait_limit_s,
        )
        try:
            answer = await answer_of(self._ledger.reserve.remote(wish))
        except asyncio.CancelledError:
            self._notices.cancelled(request.request_id)
            raise
        except CallFailed as error:  # no notice: it could arrive after the next try and cancel that
            raise NotTakenUp(f"the ledger of {self._model} gave no answer: {error}") from error
        if isinstance(answer, Refusal):
            raise error_of(answer)
        if not isinstance(answer, Grant):
            raise TypeError(f"the ledger answered with a {type(answer).__name__}, not a Grant or Refusal")
        return answer

    async def _stream(self, request: GenerationRequest, grant: Grant) -> AsyncGenerator[TokenChunk, None]:
        """One attempt. The first item says that the replica took the grant up; NotTakenUp comes before it or never."""
        call: Any = self._streams[grant.pool].generate.remote(request)
        taken_up = ended = False
        try:
            async for chunk in call:
                if not taken_up:
                    if chunk.finish_reason == "error" and (chunk.error or "").startswith(REFUSED):
                        self._notices.unused(grant.grant_id)
                        raise NotTakenUp(chunk.error)
                    taken_up = True
                    yield TokenChunk(request.request_id)
                    if chunk == TokenChunk(request.request_id):
                        continue
                ended = chunk.finish_reason is not None
                yield chunk
                if ended:
                    return
            reason = "its stream stopped without a last chunk"
        except asyncio.CancelledError:
            if cancelled_here():
                raise
            reason = "it cancelled the request, as a replica that shuts down does"
        except NotTakenUp:
            raise
        except Exception as error:  # noqa: BLE001  whatever failed over there must reach the client as its end
            reason = self._note_loss(grant, error)
        finally:
            if not ended:
                cancel(call)
        if not taken_up:
            raise NotTakenUp(f"replica {grant.replica_id} was lost: {reason}")
        logger.error("request %s failed on replica %s: %s", request.request_id, grant.replica_id, reason)
        text = f"replica {grant.replica_id} failed while it generated: {reason}. Send the request again"
        yield TokenChunk(request.request_id, finish_reason="error", error=text)

    def _note_loss(self, grant: Grant, error: Exception) -> str:
        """Tell the ledger what the error says about the grant and its replica; returns the error's text."""
        if isinstance(error, NotSent):
            self._notices.unused(grant.grant_id)
        if isinstance(error, (ReplicaUnavailableError, RayActorError)):
            self._notices.lost(grant.replica_id, grant.replica_epoch)
        return one_line(error)


def error_of(refusal: Refusal) -> RequestError:
    """The exception that a refusal is to the client."""
    match refusal.kind:
        case "too_long":
            return ContextLengthExceeded(refusal.message)
        case "queue_full" | "deadline":
            return Overloaded(refusal.message, retry_after_s=refusal.retry_after_s)
        case "no_replica":
            return NoReplica(refusal.message, retry_after_s=refusal.retry_after_s)
        case "unknown_pool":
            return BadRequest(refusal.message, param="pool")
        case "version":
            return EngineFailed(refusal.message)
