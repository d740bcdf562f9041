"""The dispatcher against handles that answer like Serve's, without Serve."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from dataclasses import replace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayError

from deployments.errors import (
    BadRequest,
    ContextLengthExceeded,
    NoReplica,
    Overloaded,
    RequestError,
)
from deployments.protocol import (
    LOCAL_EPOCH,
    LOST,
    REFUSED,
    GenerationRequest,
    Grant,
    IngressNotice,
    LedgerNews,
    Refusal,
    RefusalKind,
    ReplicaSpot,
    ReserveRequest,
    Sampling,
    TokenChunk,
)
from deployments.routing.calls import NotSent, Rejected
from deployments.routing.dispatch import MAX_LOSSES, ServeDispatcher, error_of

REQUEST = GenerationRequest("q", (1, 2, 3), Sampling(max_tokens=4, seed=0), tenant="me", priority=-2)
TAKEN = TokenChunk("q")


class Call:
    """A Serve response: awaitable or iterable, and to be cancelled."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.cancelled = False

    def __await__(self) -> Generator[Any, None, Any]:
        return self._get().__await__()

    async def _get(self) -> Any:
        answer = self.answer() if callable(self.answer) else self.answer
        if isinstance(answer, Awaitable):
            answer = await answer
        if isinstance(answer, BaseException):
            raise answer
        return answer

    async def __aiter__(self) -> AsyncIterator[Any]:
        for item in self.answer:
            await asyncio.sleep(0)
            if isinstance(item, BaseException):
                raise item
            if callable(item):
                await item()
            else:
                yield item

    def cancel(self) -> None:
        self.cancelled = True


class Method:
    def __init__(self, answer: Callable[..., Any]) -> None:
        self._answer = answer
        self.calls: list[Call] = []

    def remote(self, *args: Any) -> Call:
        self.calls.append(Call(self._answer(*args)))
        return self.calls[-1]


class World:
    """A ledger handle and a pool handle with scripts of answers."""

    def __init__(self, reserves: list[Any], streams: list[Any]) -> None:
        self.reserves, self.streams = list(reserves), list(streams)
        self.wishes: list[ReserveRequest] = []
        self.sent: list[GenerationRequest] = []
        self.notices: list[IngressNotice] = []
        self.reserve = Method(self._reserve)
        self.generate = Method(self._generate)
        self.notice = Method(self._notice)
        self.awake = Method(lambda: self.woken.wait)
        self.woken = asyncio.Event()
        self.snapshot = Method(lambda: RayError("no ledger"))
        self.news = LedgerNews(7, 4096)
        self.dispatcher = ServeDispatcher("m", "in", self, {"default": self}, ledger_limit_s=0.05)  # type: ignore[arg-type, dict-item]  # plays both handles

    def options(self, *, method_name: str, stream: bool, **serialization: str) -> Method:
        assert stream == (method_name == "generate")
        assert set(serialization.values()) == {"pickle"}
        method: Method = getattr(self, method_name)
        return method

    def _reserve(self, wish: ReserveRequest) -> Any:
        self.wishes.append(wish)
        return self.reserves.pop(0)

    def _generate(self, request: GenerationRequest) -> Any:
        self.sent.append(request)
        return self.streams.pop(0)

    def _notice(self, notice: IngressNotice) -> Any:
        self.notices.append(notice)
        return self.news

    async def told(self) -> tuple[list[str], list[str], list[tuple[str, int]]]:
        """(unused, cancelled, lost) in all notices."""
        await self.dispatcher.close()
        return (
            [key for notice in self.notices for key in notice.unused],
            [key for notice in self.notices for key in notice.cancelled],
            [pair for notice in self.notices for pair in notice.lost],
        )


def grant(number: int = 1) -> Grant:
    return Grant(f"g{number}", "q", "default", f"r{number}", 1, 7, 1, 1e12)


def text(*ids: int, finish: Any = None) -> TokenChunk:
    return TokenChunk("q", ids, finish_reason=finish)


async def run(world: World, wait: float = 5.0) -> list[TokenChunk]:
    chunks = await world.dispatcher.dispatch(REQUEST, wait_limit_s=wait)
    return [chunk async for chunk in chunks]


async def test_a_request_is_granted_sent_and_streamed() -> None:
    world = World([grant()], [[TAKEN, text(5), text(6, finish="length")]])
    assert await run(world) == [text(5), text(6, finish="length")]
    assert world.wishes[0].prompt_tokens == 3
    assert world.wishes[0].max_tokens == 4
    assert (world.wishes[0].tenant, world.wishes[0].priority) == ("me", -2)
    assert world.sent[0].grant == grant()
    assert not world.generate.calls[0].cancelled
    assert await world.told() == ([], [], [])


async def test_dispatch_returns_before_the_first_token() -> None:
    gate = asyncio.Event()
    world = World([grant()], [[TAKEN, gate.wait, text(5, finish="stop")]])
    chunks = await asyncio.wait_for(world.dispatcher.dispatch(REQUEST, wait_limit_s=5.0), 1.0)
    gate.set()
    assert [chunk async for chunk in chunks] == [text(5, finish="stop")]
    await world.dispatcher.close()


async def test_a_first_chunk_with_tokens_is_not_lost() -> None:
    world = World([grant()], [[text(5, finish="stop")]])
    assert await run(world) == [text(5, finish="stop")]
    await world.dispatcher.close()


@pytest.mark.parametrize(
    ("failure", "unused", "lost"),
    [
        ([TokenChunk("q", finish_reason="error", error=REFUSED + "expired")], ["g1"], []),
        ([NotSent("r1")], ["g1"], [("r1", 1)]),
        ([Rejected("too many calls")], ["g1"], []),
        ([ActorDiedError()], [], [("r1", 1)]),
        ([RayError("the replica raised")], [], []),
        ([], [], []),
        ([asyncio.CancelledError()], [], []),
    ],
    ids=["refused", "not sent", "rejected", "died", "raised", "ended early", "cancelled over there"],
)
async def test_lost_before_the_take_up_is_tried_again(
    failure: list[Any], unused: list[str], lost: list[tuple[str, int]]
) -> None:
    world = World([grant(1), grant(2)], [failure, [TAKEN, text(5, finish="stop")]])
    assert await run(world) == [text(5, finish="stop")]
    assert [request.grant for request in world.sent] == [grant(1), grant(2)]
    assert world.wishes[1].wait_limit_s < world.wishes[0].wait_limit_s
    assert await world.told() == (unused, [], lost)


async def test_rejected_until_the_wait_ends_is_too_much_load() -> None:
    world = World([grant()], [[Rejected("too many calls")]])
    with pytest.raises(Overloaded, match="too many calls"):
        await run(world, wait=0.01)
    assert await world.told() == (["g1"], [], [])


LOSSES: dict[str, list[Any]] = {
    "died": [ActorDiedError()],
    "raised": [RayError("x")],
    "ended": [],
    "cut": [asyncio.CancelledError()],
    "engine gone": [TokenChunk("q", finish_reason="error", error=LOST + "killed")],
}


@pytest.mark.parametrize("failure", LOSSES.values(), ids=LOSSES)
async def test_lost_while_it_streams_is_resumed_where_it_was(failure: list[Any]) -> None:
    rest = [TokenChunk("q~1"), TokenChunk("q~1", (7,)), TokenChunk("q~1", (8,), finish_reason="length")]
    world = World([grant(1), grant(2)], [[TAKEN, text(5), text(6), *failure], rest])
    assert await run(world) == [text(5), text(6), text(7), text(8, finish="length")]
    first, second = world.sent
    assert (first.request_id, first.prompt_ids, first.resumed_tokens) == ("q", (1, 2, 3), 0)
    assert (second.request_id, second.prompt_ids, second.resumed_tokens) == ("q~1", (1, 2, 3, 5, 6), 2)
    assert (second.sampling, second.prompt_tokens, second.grant) == (first.sampling, 3, grant(2))
    wish = world.wishes[1]
    assert (wish.request_id, wish.prompt_tokens, wish.max_tokens, wish.pool) == ("q~1", 5, 2, "default")
    await world.dispatcher.close()


async def test_lost_before_the_first_token_may_go_to_any_pool() -> None:
    world = World([grant(1), grant(2)], [[TAKEN, ActorDiedError()], [TokenChunk("q~1", (5,), finish_reason="stop")]])
    assert await run(world) == [text(5, finish="stop")]
    assert [wish.pool for wish in world.wishes] == [None, None]
    assert await world.told() == ([], [], [("r1", 1)])


async def test_tokens_that_come_with_the_loss_are_not_lost() -> None:
    last = TokenChunk("q", (6,), finish_reason="error", error=LOST + "killed")
    world = World([grant(1), grant(2)], [[TAKEN, text(5), last], [TokenChunk("q~1", (7,), finish_reason="stop")]])
    assert await run(world) == [text(5), text(6), text(7, finish="stop")]
    assert world.sent[1].prompt_ids == (1, 2, 3, 5, 6)
    await world.dispatcher.close()


async def test_what_can_not_be_resumed_ends_in_one_error_chunk_that_says_so() -> None:
    world = World([grant(), Refusal("q~1", "no_replica", "none is alive")], [[TAKEN, text(5), ActorDiedError()]])
    chunks = await run(world)
    assert [chunk.finish_reason for chunk in chunks] == [None, "error"]
    error = chunks[-1].error or ""
    assert "replica r1 failed after 1 tokens" in error
    assert "could not be resumed: none is alive" in error
    await world.dispatcher.close()


async def test_a_request_that_kills_what_it_runs_on_is_not_tried_on_every_replica() -> None:
    world = World([grant(n) for n in range(9)], [[TAKEN, RayError("killed")] for _ in range(9)])
    (chunk,) = await run(world)
    assert "not tried on more" in (chunk.error or "")
    assert len(world.sent) == MAX_LOSSES + 1
    await world.dispatcher.close()


async def test_streams_on_a_replica_whose_heartbeats_stopped_go_on_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.routing.notices.RENEW_S", 0.01)
    never = asyncio.Event()
    rest = [TokenChunk("q~1"), TokenChunk("q~1", (6,), finish_reason="stop")]
    world = World([grant(1), grant(2)], [[TAKEN, text(5), never.wait], rest])
    chunks = await world.dispatcher.dispatch(REQUEST, wait_limit_s=5.0)
    assert await anext(chunks) == text(5)
    world.news = LedgerNews(7, 4096, silent=(("r1", 2), ("r2", 1)))  # another life of it
    reader = asyncio.create_task(anext(chunks))
    await asyncio.sleep(0.1)
    assert not reader.done()
    world.news = LedgerNews(7, 4096, silent=(("r1", 1),))
    assert await asyncio.wait_for(reader, 5.0) == text(6, finish="stop")
    assert world.generate.calls[0].cancelled
    await chunks.aclose()
    await world.dispatcher.close()


async def test_a_replica_that_says_nothing_until_the_grant_expired_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.routing.attempt.TAKE_UP_SLACK_S", 0.02)
    frozen = asyncio.Event()
    expired = replace(grant(1), expires_at=0.0)
    world = World([expired, grant(2)], [[frozen.wait, TAKEN], [TokenChunk("q~1", (5,), finish_reason="stop")]])
    assert await asyncio.wait_for(run(world), 5.0) == [text(5, finish="stop")]
    assert world.generate.calls[0].cancelled
    await world.dispatcher.close()


# Without a replica


async def test_one_call_waits_at_a_pool_for_as_long_as_its_first_replica_is_wanted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("deployments.routing.notices.RENEW_S", 0.01)
    world = World([], [])
    world.news = LedgerNews(7, None, wake=("default",))
    world.dispatcher.start()
    while len(world.notices) < 5:
        await asyncio.sleep(0.001)
    assert len(world.awake.calls) == 1
    world.news = LedgerNews(7, None)  # nobody waits any more
    while not world.awake.calls[0].cancelled:
        await asyncio.sleep(0.001)
    world.news = LedgerNews(7, None, wake=("default",))
    while len(world.awake.calls) < 2:
        await asyncio.sleep(0.001)
    world.woken.set()  # the replica is there, and gone again before it served anybody
    while len(world.awake.calls) < 3:
        await asyncio.sleep(0.001)
    await world.dispatcher.close()


async def test_a_call_that_fails_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.routing.notices.RENEW_S", 0.01)
    world = World([], [])
    world.awake = Method(lambda: RayError("it could not start"))
    world.news = LedgerNews(7, None, wake=("default",))
    world.dispatcher.start()
    while len(world.awake.calls) < 3:
        await asyncio.sleep(0.001)
    await world.dispatcher.close()


async def test_the_pool_that_a_request_insists_on_is_asked_for() -> None:
    world = World([grant()], [[TAKEN, text(5, finish="stop")]])
    chunks = await world.dispatcher.dispatch(replace(REQUEST, pool="int8"), wait_limit_s=5.0)
    assert [chunk async for chunk in chunks] == [text(5, finish="stop")]
    assert [wish.pool for wish in world.wishes] == ["int8"]
    await world.dispatcher.close()


# Without a ledger

SPOT = ReplicaSpot("r5", "default", 1, 16, 10, 8, 160)


async def acquainted(reserves: list[Any], streams: list[Any]) -> World:
    """A world whose dispatcher has heard of one replica."""
    world = World(reserves, streams)
    world.news = LedgerNews(7, 160, expected_output_tokens=9, spots=(SPOT,))
    world.dispatcher.start()
    world.dispatcher._notices.probe()
    while world.dispatcher.max_context is None:
        await asyncio.sleep(0.001)
    return world


async def test_a_new_ledger_that_knows_nothing_yet_leaves_the_contexts_as_they_were() -> None:
    world = World([], [])
    assert not world.dispatcher.ledger_answered
    world.news = LedgerNews(7, 160, pool_contexts=(("default", 160),), living_contexts=(("default", 100),))
    await renewed(world)
    assert world.dispatcher.ledger_answered
    world.news = LedgerNews(8, None, warming=True)
    await renewed(world)
    dispatcher = world.dispatcher
    assert (dispatcher.max_context, dispatcher.context_of("default"), dispatcher.living_context(None)) == (
        160,
        160,
        100,
    )
    await dispatcher.close()


async def renewed(world: World) -> None:
    """Until the dispatcher has heard the world's news."""
    world.dispatcher.start()
    world.dispatcher._notices.probe()
    async with asyncio.timeout(10):
        while world.dispatcher._notices.news is not world.news:
            await asyncio.sleep(0.001)


async def test_who_lost_its_replica_says_so_when_it_asks_again() -> None:
    rest = [TokenChunk("q~1"), TokenChunk("q~1", (6,), finish_reason="stop")]
    world = World([grant(1), grant(2)], [[TAKEN, text(5), ActorDiedError()], rest])
    assert await run(world) == [text(5), text(6, finish="stop")]
    assert [wish.resumes for wish in world.wishes] == [False, True]
    await world.dispatcher.close()


@pytest.mark.parametrize(
    ("failure", "resumes"),
    [
        (Rejected("too many calls"), False),
        (TokenChunk("q", finish_reason="error", error=REFUSED + "expired"), False),
        (ActorDiedError(), True),
        (NotSent("r1"), True),
    ],
    ids=["rejected", "refused", "died", "not sent"],
)
async def test_who_was_granted_in_vain_resumes_only_where_the_replica_was_lost(failure: Any, resumes: bool) -> None:
    """A replica may refuse any number within milliseconds; it can be lost by no more than it had room for."""
    world = World([grant(1), grant(2)], [[failure], [TAKEN, text(5, finish="stop")]])
    assert await run(world) == [text(5, finish="stop")]
    assert [wish.resumes for wish in world.wishes] == [False, resumes]
    await world.dispatcher.close()


async def test_a_ledger_that_died_is_done_without() -> None:
    world = await acquainted([ActorDiedError()], [[TAKEN, text(5, finish="stop")]])
    assert await run(world) == [text(5, finish="stop")]
    local = world.sent[0].grant
    assert local is not None
    assert (local.replica_id, local.replica_epoch, local.ledger_epoch, local.blocks) == ("r5", 1, LOCAL_EPOCH, 1)
    assert await world.dispatcher.is_ready()
    await world.dispatcher.close()


async def test_a_ledger_that_hangs_is_done_without_in_bounded_time() -> None:
    world = await acquainted([asyncio.Event().wait], [[TAKEN, text(5, finish="stop")]])
    asked = world.notice._answer
    world.notice._answer = lambda _: asyncio.Event().wait
    world.dispatcher._notices.probe()
    assert await asyncio.wait_for(run(world), 5.0) == [text(5, finish="stop")]
    assert world.reserve.calls[0].cancelled
    world.notice._answer = asked
    assert (await world.told())[1] == ["q"]  # should it answer after all, nobody waits


async def test_it_is_not_asked_while_it_is_gone_and_asked_again_when_it_is_back() -> None:
    world = await acquainted([grant(1)], [[TAKEN, text(5, finish="stop")]] * 2)
    asked = world.notice._answer
    world.notice._answer = lambda _: RayError("gone")
    world.dispatcher._notices.probe()
    while not world.dispatcher._notices.gone:
        await asyncio.sleep(0.001)
    await run(world)
    assert world.wishes == []
    world.notice._answer = asked
    while world.dispatcher._notices.gone:
        await asyncio.sleep(0.01)
    await run(world)
    assert [wish.request_id for wish in world.wishes] == ["q"]
    await world.dispatcher.close()


async def test_full_replicas_are_tried_until_the_deadline_and_then_it_is_429() -> None:
    full = TokenChunk("q", finish_reason="error", error=REFUSED + "0 blocks are free")
    world = await acquainted([RayError("gone")] * 20, [[full]] * 20)
    with pytest.raises(Overloaded, match="0 blocks are free") as caught:
        await run(world, wait=0.3)
    assert caught.value.retry_after_s
    assert len(world.sent) >= 2
    assert (await world.told())[0] == []  # no ledger made those grants


async def test_an_error_of_the_engine_passes_through() -> None:
    failed = TokenChunk("q", finish_reason="error", error="out of memory")
    world = World([grant()], [[TAKEN, failed]])
    assert await run(world) == [failed]
    assert not world.generate.calls[0].cancelled
    await world.dispatcher.close()


async def test_closing_cancels_the_replicas_call_once() -> None:
    world = World([grant()], [[TAKEN, text(5), text(6)]])
    chunks = await world.dispatcher.dispatch(REQUEST, wait_limit_s=5.0)
    await chunks.aclose()
    await chunks.aclose()
    assert world.generate.calls[0].cancelled
    assert await world.told() == ([], [], [])


async def test_cancelling_while_it_waits_tells_the_ledger() -> None:
    world = World([lambda: asyncio.sleep(60)], [])
    task = asyncio.create_task(world.dispatcher.dispatch(REQUEST, wait_limit_s=60.0))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert world.reserve.calls[0].cancelled
    assert await world.told() == ([], ["q"], [])


async def test_cancelling_before_the_take_up_cancels_the_call() -> None:
    gate = asyncio.Event()
    world = World([grant()], [[gate.wait, TAKEN]])
    task = asyncio.create_task(world.dispatcher.dispatch(REQUEST, wait_limit_s=60.0))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert world.generate.calls[0].cancelled
    assert len(world.sent) == 1
    assert await world.told() == ([], [], [])
    assert [key for notice in world.notices for key in notice.left] == ["g1"]


async def test_cancelling_before_the_take_up_of_a_local_grant_tells_the_ledger_nothing() -> None:
    gate = asyncio.Event()
    world = await acquainted([RayError("gone")], [[gate.wait, TAKEN]])
    task = asyncio.create_task(world.dispatcher.dispatch(REQUEST, wait_limit_s=60.0))
    while not world.sent:
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await world.dispatcher.close()
    assert [key for notice in world.notices for key in notice.left] == []


async def test_without_ledger_and_news_it_is_tried_until_the_deadline() -> None:
    world = World([RayError("gone")] * 20, [])
    with pytest.raises(NoReplica, match="ledger of m is gone"):
        await run(world, wait=0.3)
    assert 2 <= len(world.wishes) <= 5  # after 0, 0.05, 0.15 s
    assert len({wish.request_id for wish in world.wishes}) == len(world.wishes)


async def test_a_reserve_cancelled_over_there_is_tried_again() -> None:
    world = World([asyncio.CancelledError(), grant()], [[TAKEN, text(5, finish="stop")]])
    assert await run(world) == [text(5, finish="stop")]
    assert await world.told() == ([], ["q"], [])
    assert [wish.request_id for wish in world.wishes] == ["q", "q~1"]  # the notice can't end the second


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("too_long", ContextLengthExceeded),
        ("queue_full", Overloaded),
        ("deadline", Overloaded),
        ("no_replica", NoReplica),
        ("unknown_pool", BadRequest),
        ("version", NoReplica),
    ],
)
async def test_a_refusal_is_raised_and_not_tried_again(kind: RefusalKind, error: type[RequestError]) -> None:
    refusal = Refusal("q", kind, "because", retry_after_s=3)
    world = World([refusal], [])
    with pytest.raises(error, match="because"):
        await run(world)
    assert type(error_of(refusal)) is error
    assert error_of(refusal).retry_after_s == (None if kind in ("too_long", "unknown_pool") else 3)
    await world.dispatcher.close()


async def test_not_ready_without_a_ledger() -> None:
    assert not await World([], []).dispatcher.is_ready()


async def test_the_lease_is_renewed_without_any_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.routing.notices.RENEW_S", 0.01)
    world = World([grant()], [[TAKEN, text(5, finish="stop")]])
    await run(world)
    async with asyncio.timeout(10):
        while len(world.notices) < 3:
            await asyncio.sleep(0.01)
    assert world.dispatcher.max_context == 4096
    await world.dispatcher.close()


async def test_a_notice_that_was_not_taken_is_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.routing.notices.RETRY_S", 0.01)
    world = World([grant(1), grant(2)], [[NotSent("r1")], [TAKEN, text(5, finish="stop")]])
    fails = [RayError("down"), RayError("down")]
    taken = world.notice._answer
    world.notice._answer = lambda notice: fails.pop() if fails else taken(notice)
    await run(world)
    await asyncio.sleep(0.1)
    assert not fails
    assert await world.told() == (["g1"], [], [("r1", 1)])
