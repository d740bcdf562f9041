"""What the API relies on in a Dispatcher (see `deployments.api.dispatcher`), checked on each implementation."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from deployments.api.dispatcher import Dispatcher
from deployments.errors import Overloaded
from deployments.protocol import GenerationRequest, Sampling, TokenChunk
from tests.fakes.dispatcher import FakeDispatcher, Script, chunks_of

TOKENS = tuple(range(5))


@dataclass
class Case:
    """One implementation, and a window on the grants behind it."""

    dispatcher: Dispatcher
    held: Callable[[], int]
    """Grants held now."""
    released: Callable[[], int]
    """Releases so far."""


def _fake_case(refuse: bool = False, step_s: float = 0.0, grant_after_s: float = 0.0) -> Case:
    refusal = Overloaded("full", retry_after_s=7) if refuse else None
    chunks = chunks_of(TOKENS, finish="length")
    fake = FakeDispatcher(Script(chunks, refusal=refusal, step_s=step_s, grant_after_s=grant_after_s))
    return Case(fake, lambda: len(fake.running), lambda: len(fake.released))


MAKERS: dict[str, Callable[..., Case]] = {"fake": _fake_case}


@pytest.fixture(params=MAKERS)
def make(request: pytest.FixtureRequest) -> Callable[..., Case]:
    maker = MAKERS[request.param]
    assert callable(maker)
    return maker


def asked(name: str = "r-0-0") -> GenerationRequest:
    return GenerationRequest(name, (1, 2, 3), Sampling(max_tokens=len(TOKENS), seed=1))


async def test_chunks_in_order_and_one_terminal(make: Callable[..., Case]) -> None:
    case = make()
    chunks = [chunk async for chunk in await case.dispatcher.dispatch(asked(), wait_limit_s=5)]
    assert tuple(t for chunk in chunks for t in chunk.token_ids) == TOKENS
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["length"]
    assert chunks[-1].finish_reason == "length"
    assert all(chunk.request_id == "r-0-0" for chunk in chunks)
    assert (case.held(), case.released()) == (0, 1)


async def test_a_grant_is_held_once_dispatch_returns(make: Callable[..., Case]) -> None:
    case = make()
    chunks = await case.dispatcher.dispatch(asked(), wait_limit_s=5)
    assert case.held() == 1
    await chunks.aclose()


async def test_a_refusal_is_raised_before_anything_is_yielded(make: Callable[..., Case]) -> None:
    case = make(refuse=True)
    with pytest.raises(Overloaded) as refusal:
        await case.dispatcher.dispatch(asked(), wait_limit_s=5)
    assert refusal.value.retry_after_s == 7
    assert case.held() == 0


@pytest.mark.parametrize("read", [0, 2])
async def test_closing_early_releases_once(make: Callable[..., Case], read: int) -> None:
    case = make()
    chunks = await case.dispatcher.dispatch(asked(), wait_limit_s=5)
    for _ in range(read):
        await anext(chunks)
    await chunks.aclose()
    await chunks.aclose()
    assert (case.held(), case.released()) == (0, 1)


async def test_closing_after_the_end_does_nothing(make: Callable[..., Case]) -> None:
    case = make()
    chunks = await case.dispatcher.dispatch(asked(), wait_limit_s=5)
    _ = [chunk async for chunk in chunks]
    await chunks.aclose()
    assert (case.held(), case.released()) == (0, 1)


async def test_cancelling_the_reader_releases(make: Callable[..., Case]) -> None:
    case = make(step_s=60)
    chunks = await case.dispatcher.dispatch(asked(), wait_limit_s=5)

    async def read() -> TokenChunk:
        return await anext(chunks)

    reader = asyncio.create_task(read())
    await asyncio.sleep(0.01)
    reader.cancel()
    await asyncio.gather(reader, return_exceptions=True)
    await chunks.aclose()
    assert (case.held(), case.released()) == (0, 1)


async def test_cancelling_dispatch_withdraws(make: Callable[..., Case]) -> None:
    case = make(grant_after_s=60)
    waiting = asyncio.create_task(case.dispatcher.dispatch(asked(), wait_limit_s=120))
    await asyncio.sleep(0.01)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert case.held() == 0


async def test_requests_do_not_wait_for_each_other(make: Callable[..., Case]) -> None:
    case = make()
    streams = await asyncio.gather(*(case.dispatcher.dispatch(asked(f"r-0-{i}"), wait_limit_s=5) for i in range(3)))
    assert case.held() == 3
    for stream in streams:
        await stream.aclose()
    assert (case.held(), case.released()) == (0, 3)


async def test_readiness(make: Callable[..., Case]) -> None:
    assert await make().dispatcher.is_ready() is True
