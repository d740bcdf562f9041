"""All choices of one HTTP request, generated side by side."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Self

from deployments.api.choices import ChoiceText, Piece
from deployments.api.dispatcher import Dispatcher
from deployments.errors import EngineFailed
from deployments.metrics.histogram import Histogram, Pace
from deployments.protocol import GenerationRequest, TokenChunk

_log = logging.getLogger(__name__)


class Fanout:
    """Dispatches requests concurrently and merges what they produce.

    Entering waits until every request was granted and taken up, or raises the first refusal. Iterating gives, in
    lists, all pieces that have arrived, as (choice number, piece); it ends after the last choice's finish and
    raises the first failure. Leaving closes what is still running. An empty list: none came for `silence_s`.

    Each choice is read by its own task at the engine's pace, so one that meets a stop string is cancelled at once,
    however slowly the client reads.

    Args:
        token_gaps: takes the times between tokens of a choice, in seconds.
        silence_s: seconds; None waits for the next piece for ever.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        requests: Sequence[GenerationRequest],
        choices: Sequence[ChoiceText],
        wait_limit_s: float,
        *,
        token_gaps: Histogram,
        silence_s: float | None = None,
    ) -> None:
        self._dispatcher = dispatcher
        self._work = list(zip(requests, choices, strict=True))
        self._wait_limit_s = wait_limit_s
        self._token_gaps = token_gaps
        self._silence_s = silence_s
        self._inbox: asyncio.Queue[tuple[int, Piece] | None] = asyncio.Queue()
        self._failure: Exception | None = None
        self._unfinished = set(range(len(requests)))
        self._unread = len(requests)
        self._tasks: list[asyncio.Task[None]] = []
        self.taken_up: set[int] = set()
        """Numbers of the choices that a replica has taken up so far, ended ones too."""

    async def __aenter__(self) -> Self:
        granted = [asyncio.get_running_loop().create_future() for _ in self._work]
        self._tasks = [asyncio.create_task(self._run(i, granted[i])) for i in range(len(self._work))]
        try:
            await asyncio.gather(*granted)
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[tuple[int, Piece]]:
        if not self._unread:
            raise StopAsyncIteration
        try:
            async with asyncio.timeout(self._silence_s):
                arrived = [await self._inbox.get()]
        except TimeoutError:
            return []
        while not self._inbox.empty():
            arrived.append(self._inbox.get_nowait())
        pieces = [item for item in arrived if item is not None]
        if self._failure is not None and not pieces:
            raise self._failure
        self._unread -= sum(piece.finish_reason is not None for _, piece in pieces)
        if self._failure is not None:
            self._inbox.put_nowait(None)
        return pieces

    async def _run(self, index: int, granted: asyncio.Future[None]) -> None:
        request, choice = self._work[index]
        try:
            chunks = await self._dispatcher.dispatch(request, wait_limit_s=self._wait_limit_s)
            self.taken_up.add(index)
            if not granted.done():
                granted.set_result(None)
            async with aclosing(chunks):
                await self._read(index, chunks, choice)
        except Exception as error:  # noqa: BLE001 - handed over to the task that answers the client, which raises it
            self._fail(index, error, granted)

    async def _read(self, index: int, chunks: AsyncGenerator[TokenChunk, None], choice: ChoiceText) -> None:
        pace, clock = Pace(self._token_gaps), asyncio.get_running_loop().time
        async for chunk in chunks:
            pace.arrive(len(chunk.token_ids), clock())
            piece = choice.feed(chunk)
            if piece.finish_reason is not None:
                self._unfinished.discard(index)
            if piece.text or piece.logprobs or piece.finish_reason is not None:
                self._inbox.put_nowait((index, piece))
            if piece.finish_reason is not None:
                return
        raise EngineFailed("the replica ended the answer without saying why; send the request again")

    def _fail(self, index: int, error: Exception, granted: asyncio.Future[None]) -> None:
        if index not in self._unfinished:
            _log.error("closing %s failed: %r", self._work[index][0].request_id, error)
        elif not granted.done():
            granted.set_exception(error)
        elif self._failure is None:
            self._failure = error
            self._inbox.put_nowait(None)

    async def _close(self) -> None:
        """Cancel the choices that still run, and wait for those that have finished to end their own closing.

        Cancelling this wait (servers do, once the answer is out) does not interrupt the closings.
        """
        for index in self._unfinished:
            self._tasks[index].cancel()
        await asyncio.wait(self._tasks)
