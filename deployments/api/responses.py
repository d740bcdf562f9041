"""A generation's answer: whole or as a stream of server-sent events, for as long as the client is there.

A failure before the status is sent becomes an error's status and body. One after it, in a stream, becomes a last
event `data: {"error": {...}}`, and the stream ends without `[DONE]`, so that it can't be taken for complete.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from deployments.api import formats
from deployments.api.choices import ChoiceText, Piece, PlacedLogprob
from deployments.api.fanout import Fanout
from deployments.api.formats import Format, Json
from deployments.api.jobs import Job
from deployments.api.problems import describe
from deployments.api.visit import Visit
from deployments.errors import RequestError, RequestTimeout
from deployments.metrics.histogram import Histogram

CLIENT_GONE = "client_gone"
LAST_WORD_S = 1.0
"""How long a client that doesn't read may keep the end of a broken stream waiting."""
"""The access log's `error` when the client left before its answer was complete."""
_SSE_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)


class GenerationResponse:
    """An ASGI response that does the work of `job` as it is sent.

    Args:
        created: Unix seconds.
        timeout_s: from the visit's arrival to the last token.
        token_gaps: takes the times between tokens, in seconds.
        keep_alive_s: longest silence in a stream, in seconds; None: any.
    """

    def __init__(
        self,
        job: Job,
        format_: Format,
        visit: Visit,
        *,
        created: int,
        timeout_s: float,
        token_gaps: Histogram,
        keep_alive_s: float | None = None,
    ) -> None:
        self._job = job
        self._format = format_
        self._visit = visit
        self._timeout_s = timeout_s
        self._token_gaps = token_gaps
        self._silence_s = keep_alive_s if job.stream else None
        text = job.model.text
        self._choices = [ChoiceText(text.detokenizer(), job.stop, r.sampling) for r in job.requests]
        self._with_logprobs = job.requests[0].sampling.logprobs is not None
        self._head: Json = {
            "id": format_.id_prefix + visit.unique,
            "object": format_.chunk_object if job.stream else format_.whole_object,
            "created": created,
            "model": job.model_name,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = self._answer_stream(send) if self._job.stream else self._answer_whole(scope, receive, send)
        try:
            await until_disconnect(receive, work)
        finally:
            if not self._visit.complete and self._visit.error is None:
                self._visit.error = CLIENT_GONE  # A failure, if it was one, overwrites it with its own code.
            self._visit.output_tokens = sum(choice.output_tokens for choice in self._choices)
            self._visit.cached_tokens = self._cached_tokens()

    async def _answer_whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        texts: list[list[Piece]] = [[] for _ in self._choices]
        async with self._generation() as generation:
            async for pieces in generation:
                self._visit.note_first_token()
                for index, piece in pieces:
                    texts[index].append(piece)
            choices = [self._whole_choice(index, pieces) for index, pieces in enumerate(texts)]
            await JSONResponse({**self._head, "choices": choices, "usage": self._usage()})(scope, receive, send)

    async def _answer_stream(self, send: Send) -> None:
        try:
            async with self._generation() as generation:
                await send({"type": "http.response.start", "status": 200, "headers": list(_SSE_HEADERS)})
                await self._stream(generation, send)
        except Exception as error:
            if self._visit.status is None:
                raise
            if isinstance(error, RequestError):
                self._visit.error = error.code
            await self._last_word(_part(formats.event(describe(error)), more=False), send)
            if not isinstance(error, RequestError):
                raise

    async def _last_word(self, message: Message, send: Send) -> None:
        """Send the end of a broken stream; a client that reads nothing does not keep its place for that.

        Raises:
            ClientDisconnect: it didn't read.
        """
        try:
            async with asyncio.timeout(LAST_WORD_S):
                await send(message)
        except TimeoutError:
            raise ClientDisconnect from None

    async def _stream(self, generation: Fanout, send: Send) -> None:
        write = formats.ChunkWriter(self._head, null_usage=self._job.include_usage).write
        for opening in filter(None, (self._format.opening(index) for index in range(len(self._choices)))):
            await send(_part(write(opening)))
        async for pieces in generation:
            if not pieces:
                await send(_part(formats.KEEP_ALIVE))
                continue
            self._visit.note_first_token()
            await send(_part(b"".join(write(self._delta(index, piece)) for index, piece in pieces)))
        last = formats.DONE
        if self._job.include_usage:
            last = formats.event({**self._head, "choices": [], "usage": self._usage()}) + last
        await send(_part(last, more=False))

    @asynccontextmanager
    async def _generation(self) -> AsyncIterator[Fanout]:
        """All choices granted and running, until the request's deadline.

        Raises:
            RequestTimeout: the deadline passed.
        """
        loop = asyncio.get_running_loop()
        deadline = self._visit.arrived + self._timeout_s
        wait_limit_s = min(self._job.model.wait_limit_s, deadline - loop.time())
        self._visit.dispatched = loop.time()
        fanout = Fanout(
            self._job.model.dispatcher,
            self._job.requests,
            self._choices,
            wait_limit_s,
            token_gaps=self._token_gaps,
            silence_s=self._silence_s,
        )
        try:
            async with asyncio.timeout_at(deadline), fanout:
                self._visit.granted = loop.time()
                yield fanout
        except TimeoutError:
            if not self._visit.complete:  # Else it was the closing of choices that had said all.
                raise RequestTimeout(
                    f"the answer took longer than {self._timeout_s:g} s, the server's api.request_timeout_s: "
                    "ask for fewer tokens, or raise it"
                ) from None
        finally:
            self._visit.taken_up_tokens = self._job.tokens_of(fanout.taken_up)

    def _delta(self, index: int, piece: Piece) -> Json:
        return self._format.delta(index, piece.text, self._logprobs(piece.logprobs), piece.finish_reason)

    def _whole_choice(self, index: int, pieces: Sequence[Piece]) -> Json:
        logprobs = [one for piece in pieces for one in piece.logprobs]
        text = "".join(piece.text for piece in pieces)
        return self._format.whole(index, text, self._logprobs(logprobs), pieces[-1].finish_reason)

    def _logprobs(self, placed: Sequence[PlacedLogprob]) -> Json | None:
        return self._format.logprobs(placed, self._job.model.text.vocabulary) if self._with_logprobs else None

    def _usage(self) -> Json:
        output_tokens = sum(choice.output_tokens for choice in self._choices)
        return formats.usage(self._job.prompt_tokens, output_tokens, self._cached_tokens())

    def _cached_tokens(self) -> int:
        """Prompt tokens that no choice had to compute: the least over a prompt's choices, summed over the prompts."""
        n = self._job.n
        by_prompt = [self._choices[i : i + n] for i in range(0, len(self._choices), n)]
        return sum(min(choice.cached_tokens for choice in choices) for choices in by_prompt)


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Run `work`, but cancel it, and wait for that, as soon as the client leaves.

    The request's body must have been read.
    """
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
    finally:
        for one in (task, watcher):
            one.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)
    if not task.cancelled():
        task.result()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _part(content: bytes, *, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": content, "more_body": more}
