from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from benchmarks.live.direct import DirectDispatcher
from deployments.errors import Overloaded
from deployments.protocol import REFUSED, GenerationRequest, Sampling, TokenChunk

REQUEST = GenerationRequest("r", (1, 2), Sampling(max_tokens=3, seed=0))


class Handle:
    """A deployment handle of one replica that answers with given chunks."""

    def __init__(self, *chunks: TokenChunk) -> None:
        self._chunks = chunks
        self.generate = self
        self.calls: list[Call] = []

    def options(self, *, stream: bool) -> Handle:
        assert stream
        return self

    def remote(self, _: GenerationRequest) -> Call:
        self.calls.append(Call(self._chunks))
        return self.calls[-1]


class Call:
    def __init__(self, chunks: tuple[TokenChunk, ...]) -> None:
        self._chunks = iter(chunks)
        self.cancelled = False

    def __aiter__(self) -> AsyncIterator[TokenChunk]:
        return self

    async def __anext__(self) -> TokenChunk:
        return next(self._chunks)

    def cancel(self) -> None:
        self.cancelled = True


async def test_all_chunks_arrive_in_order_and_an_ended_call_is_left_alone() -> None:
    sent = (TokenChunk("r", (7,)), TokenChunk("r", (8, 9), finish_reason="stop"))
    handle: Any = Handle(*sent)
    chunks = await DirectDispatcher(handle, 100).dispatch(REQUEST, wait_limit_s=1.0)
    assert tuple([chunk async for chunk in chunks]) == sent
    assert [call.cancelled for call in handle.calls] == [False]


async def test_a_refusal_is_an_overload_and_nothing_is_left_to_cancel() -> None:
    handle: Any = Handle(TokenChunk("r", finish_reason="error", error=REFUSED + "32 wait"))
    with pytest.raises(Overloaded, match="32 wait"):
        await DirectDispatcher(handle, 100).dispatch(REQUEST, wait_limit_s=1.0)
    assert [call.cancelled for call in handle.calls] == [False]


async def test_a_client_that_leaves_cancels_the_call() -> None:
    handle: Any = Handle(TokenChunk("r", (7,)), TokenChunk("r", (8,)))
    chunks = await DirectDispatcher(handle, 100).dispatch(REQUEST, wait_limit_s=1.0)
    assert await anext(chunks) == TokenChunk("r", (7,))
    await chunks.aclose()
    assert [call.cancelled for call in handle.calls] == [True]
