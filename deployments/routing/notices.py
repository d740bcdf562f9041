"""What an ingress owes the ledger, sent by one background task: no timer and no call per request.

The task runs in an empty context. Serve cancels the calls that a request's context has in flight when the client
leaves, and a grant given back in such a call would be lost just when it matters.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from ray.serve.handle import DeploymentHandle

from deployments.metrics.vitals import IngressVitals
from deployments.protocol import IngressNotice, LedgerNews
from deployments.routing.calls import CallFailed, answer_of, method_of

logger = logging.getLogger(__name__)

RENEW_S = 1.0
RETRY_S = 0.5


class NoticeSender:
    """Collects what happened and sends it together; renews the lease each second. For one event loop.

    Args:
        ingress_id: whose lease it is.
        ledger: where notices go.
        limit_s: a ledger that doesn't answer a notice within this many seconds is gone, until it answers one.
        on_news: called with each answer.
        vitals: what to tell of this ingress with the next notice, if anything.
    """

    def __init__(
        self,
        ingress_id: str,
        ledger: DeploymentHandle[Any],
        *,
        limit_s: float,
        on_news: Callable[[LedgerNews], None],
        vitals: Callable[[], IngressVitals | None] = lambda: None,
    ) -> None:
        self._ingress_id = ingress_id
        self._ledger_notice = method_of(ledger, "notice")
        self._limit_s = limit_s
        self._on_news = on_news
        self._vitals = vitals
        self._waits: set[asyncio.Timeout] = set()
        self._unused: list[str] = []
        self._left: list[str] = []
        self._cancelled: list[str] = []
        self._lost: set[tuple[str, int]] = set()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.news: LedgerNews | None = None
        """The ledger's newest answer."""
        self.gone = False
        """Whether the ledger gave no answer to the last notice."""

    def start(self) -> None:
        """Start the task on the running loop; raises what stopped it if it stopped."""
        if self._task is None:
            context = contextvars.Context()
            self._task = asyncio.get_running_loop().create_task(self._send_forever(), context=context)
        elif self._task.done():
            self._task.result()

    def unused(self, grant_id: str) -> None:
        """No replica took or will take this grant up."""
        self._unused.append(grant_id)
        self._wake.set()

    def left(self, grant_id: str) -> None:
        """Nobody waits any more for the replica's word on this grant."""
        self._left.append(grant_id)
        self._wake.set()

    def cancelled(self, request_id: str) -> None:
        """The client left before the ledger's answer came."""
        self._cancelled.append(request_id)
        self._wake.set()

    def lost(self, replica_id: str, epoch: int) -> None:
        """A call found this life of a replica dead or gone."""
        self._lost.add((replica_id, epoch))
        self._wake.set()

    def probe(self) -> None:
        """Something failed that the ledger should have done: find out now whether it is there."""
        self._wake.set()

    @contextlib.asynccontextmanager
    async def while_there(self) -> AsyncIterator[None]:
        """Bounds what is awaited inside by the ledger's presence.

        Raises:
            CallFailed: the ledger is gone, or was found to be.
        """
        reason = f"it answers no notice within {self._limit_s:g} s (api.ledger_limit_s)"
        if self.gone:
            raise CallFailed(reason)
        try:
            async with asyncio.timeout(None) as wait:
                self._waits.add(wait)
                try:
                    yield
                finally:
                    self._waits.discard(wait)
        except TimeoutError:
            raise CallFailed(reason) from None

    async def close(self) -> None:
        """Stop the task and send what is left."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None
        if self._wake.is_set():
            await self._send()

    async def _send_forever(self) -> None:
        while True:
            # asyncio.wait_for of Python 3.11 loses a cancellation that comes together with the event
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RENEW_S):
                    await self._wake.wait()
            if not await self._send():
                await asyncio.sleep(RETRY_S)

    async def _send(self) -> bool:
        self._wake.clear()
        unused, self._unused = self._unused, []
        left, self._left = self._left, []
        cancelled, self._cancelled = self._cancelled, []
        lost, self._lost = self._lost, set()
        notice = IngressNotice(
            self._ingress_id,
            unused=tuple(unused),
            left=tuple(left),
            cancelled=tuple(cancelled),
            lost=tuple(sorted(lost)),
            vitals=self._vitals(),
        )
        sent = False
        try:
            news: LedgerNews = await answer_of(self._ledger_notice.remote(notice), self._limit_s)
            sent = True
        except CallFailed as error:
            self._note_gone(error)
        finally:
            if not sent:
                self._unused[:0], self._left[:0], self._cancelled[:0] = unused, left, cancelled
                self._lost |= lost
                self._wake.set()
        if sent:
            self._note_there(news)
        return sent

    def _note_gone(self, error: CallFailed) -> None:
        if not self.gone:
            logger.warning("the ledger is gone, and is asked again every %g s: %s", RETRY_S, error)
        self.gone = True
        for wait in self._waits:
            if not wait.expired():
                wait.reschedule(asyncio.get_running_loop().time())

    def _note_there(self, news: LedgerNews) -> None:
        if self.gone:
            logger.info("the ledger is there again, in epoch %d", news.epoch)
        self.gone, self.news = False, news
        self._on_news(news)
