"""One try of a request on the replica that its grant names: send, wait for the take-up, read, give up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from deployments.protocol import LOST, REFUSED, GenerationRequest, Grant, TokenChunk
from deployments.routing.calls import Rejected, cancel, cancelled_here, one_line

TAKE_UP_SLACK_S = 2.0
"""How long the word of a take-up may be on its way after the grant's expiry, from which on there can be none."""


class NotTakenUp(Exception):
    """The replica refused the grant, or was lost before it took the grant up.

    Args:
        reason: one line.
        busy: it has no room.
        lost: it was granted and lost, rather than that it said no.
    """

    def __init__(self, reason: str, *, busy: bool = False, lost: bool = False) -> None:
        super().__init__(reason)
        self.busy = busy
        self.lost = lost


class Refused(NotTakenUp):
    """The replica said no: nothing of the request is there."""


class Lost(Exception):
    """The replica, or its engine, was lost while it had the request. `cause` is what the call raised, if it did."""

    def __init__(self, reason: str, cause: Exception | None = None) -> None:
        super().__init__(reason)
        self.cause = cause


class Attempt:
    """A call of `generate` on one replica.

    Args:
        request: with its grant.
        call: what `generate.remote(request)` returned.
    """

    def __init__(self, request: GenerationRequest, grant: Grant, call: Any) -> None:
        self.request = request
        self.grant = grant
        self._call = call
        self._chunks: AsyncIterator[TokenChunk] = aiter(call)
        self._first: TokenChunk | None = None
        self._ended = False
        self._over: str | None = None
        """Why nothing more is worth waiting for."""
        self._waiting: asyncio.Timeout | None = None

    async def take_up(self) -> None:
        """Wait until the replica has taken the request up.

        Raises:
            Refused: it won't, or Serve did not let the call in there.
            Lost: it did not say in time, or can't any more.
        """
        limit_s = max(0.0, self.grant.expires_at - time.time()) + TAKE_UP_SLACK_S
        try:
            chunk = await self._next(limit_s)
        except Lost as loss:
            if isinstance(loss.cause, Rejected):
                raise Refused(str(loss), busy=True) from None
            raise
        if chunk.finish_reason == "error" and (chunk.error or "").startswith(REFUSED):
            self._ended = True
            raise Refused(chunk.error or REFUSED)
        if chunk.token_ids or chunk.finish_reason is not None:
            self._first = chunk

    async def read(self) -> TokenChunk:
        """The next chunk.

        Raises:
            Lost: there will be none, and none before said that the request has ended.
        """
        chunk, self._first = self._first, None
        if chunk is None:
            chunk = await self._next(None)
        if chunk.finish_reason == "error" and (chunk.error or "").startswith(LOST):
            self._ended, self._over = True, chunk.error
            if not chunk.token_ids:
                raise Lost(chunk.error or LOST)
            return chunk._replace(finish_reason=None, error=None)
        self._ended = chunk.finish_reason is not None
        return chunk

    def abandon(self, reason: str) -> None:
        """Wait no longer: whoever reads now, or next, learns that the replica is lost."""
        self._over = self._over or reason
        if self._waiting is not None and not self._waiting.expired():
            self._waiting.reschedule(asyncio.get_running_loop().time())

    def close(self) -> None:
        """End the call over there unless it has ended. Any number of times."""
        if not self._ended:
            self._ended = True
            cancel(self._call)

    async def _next(self, limit_s: float | None) -> TokenChunk:
        if self._over is not None:
            raise Lost(self._over)
        try:
            async with asyncio.timeout(limit_s) as self._waiting:
                return await anext(self._chunks)
        except StopAsyncIteration:
            raise Lost("its stream stopped without a last chunk") from None
        except TimeoutError:
            raise Lost(self._over or f"it said nothing for {limit_s:.0f} s") from None
        except asyncio.CancelledError:
            if cancelled_here():
                raise
            raise Lost("it cancelled the request, as a replica that shuts down does") from None
        except Exception as error:
            raise Lost(one_line(error), error) from error
        finally:
            self._waiting = None
