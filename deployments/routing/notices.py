"""What an ingress owes the ledger, sent by one background task: no timer and no call per request.

The task runs in an empty context. Serve cancels the calls that a request's context has in flight when the client
leaves, and a grant given back in such a call would be lost just when it matters.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
from typing import Any

from ray.serve.handle import DeploymentHandle

from deployments.protocol import IngressNotice, LedgerNews
from deployments.routing.calls import CallFailed, answer_of

logger = logging.getLogger(__name__)

RENEW_S = 1.0
RETRY_S = 0.5
ANSWER_LIMIT_S = 5.0


class NoticeSender:
    """Collects what happened and sends it together; renews the lease each second. For one event loop."""

    def __init__(self, ingress_id: str, ledger: DeploymentHandle[Any]) -> None:
        self._ingress_id = ingress_id
        self._ledger = ledger
        self._unused: list[str] = []
        self._cancelled: list[str] = []
        self._lost: set[tuple[str, int]] = set()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.news: LedgerNews | None = None
        """The ledger's newest answer."""

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

    def cancelled(self, request_id: str) -> None:
        """The client left before the ledger's answer came."""
        self._cancelled.append(request_id)
        self._wake.set()

    def lost(self, replica_id: str, epoch: int) -> None:
        """A call found this life of a replica dead or gone."""
        self._lost.add((replica_id, epoch))
        self._wake.set()

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
        cancelled, self._cancelled = self._cancelled, []
        lost, self._lost = self._lost, set()
        notice = IngressNotice(self._ingress_id, tuple(unused), tuple(cancelled), tuple(sorted(lost)))
        sent = False
        try:
            self.news = await answer_of(self._ledger.notice.remote(notice), ANSWER_LIMIT_S)
            sent = True
        except CallFailed as error:
            logger.warning("the ledger took no notice, trying again in %g s: %s", RETRY_S, error)
        finally:
            if not sent:
                self._unused[:0], self._cancelled[:0] = unused, cancelled
                self._lost |= lost
                self._wake.set()
        return sent
