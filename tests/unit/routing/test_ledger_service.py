"""The Serve shell's class, called as Serve would, without Serve."""

from __future__ import annotations

import asyncio

import pytest

from deployments.protocol import Grant, IngressNotice, Refusal
from deployments.routing.ledger_deployment import LedgerService, deployment_name
from deployments.routing.refusals import LedgerConfig
from tests.unit.routing.worlds import granted, state, wish


async def service(queue_limit: int = 1024) -> LedgerService:
    """With one replica of 10 blocks that knows it."""
    built = LedgerService(LedgerConfig("m", queue_limit=queue_limit))
    epoch = (await built.report(state(ledger_epoch=0))).epoch
    assert (await built.report(state(sequence=2, ledger_epoch=epoch))).epoch == epoch
    return built


async def charged(built: LedgerService) -> int:
    return (await built.snapshot()).replicas[0].charged_blocks


async def test_a_waiter_is_woken_by_a_give_back() -> None:
    built = await service()
    whole = granted(await built.reserve(wish("a", prompt=100, output=60)))
    waiting = asyncio.create_task(built.reserve(wish("b")))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    await built.notice(IngressNotice("in", unused=(whole.grant_id,)))
    assert isinstance(await asyncio.wait_for(waiting, 0.04), Grant)
    await built.check_health()


async def test_the_deadline_is_kept_by_the_clock() -> None:
    built = await service()
    await built.reserve(wish("a", prompt=100, output=60))
    answer = await asyncio.wait_for(built.reserve(wish("b", wait_limit_s=0.1)), 1.0)
    assert isinstance(answer, Refusal)
    assert answer.kind == "deadline"


async def test_a_cancelled_call_leaves_the_queue_and_lets_the_next_one_in() -> None:
    built = await service()
    await built.reserve(wish("a", prompt=50, output=14))  # 4 of 10 blocks
    first = asyncio.create_task(built.reserve(wish("large", prompt=100, output=20)))
    second = asyncio.create_task(built.reserve(wish("small")))
    await asyncio.sleep(0.01)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert isinstance(await asyncio.wait_for(second, 0.04), Grant)
    await built.check_health()


async def test_a_grant_made_in_the_moment_of_the_cancellation_is_given_back() -> None:
    built = await service()
    whole = granted(await built.reserve(wish("a", prompt=100, output=60)))
    waiting = asyncio.create_task(built.reserve(wish("b")))
    await asyncio.sleep(0.01)
    waiting.cancel()  # not delivered yet
    built._ledger.release(whole.grant_id, 0.0)
    built._admit()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await charged(built) == 0
    await built.check_health()


async def test_who_makes_room_in_a_full_queue_for_another_tenant_is_told_at_once() -> None:
    built = await service(queue_limit=2)
    await built.reserve(wish("a", prompt=100, output=60))
    flood = [asyncio.create_task(built.reserve(wish(f"f{k}", tenant="flood"))) for k in range(2)]
    await asyncio.sleep(0.01)
    mine = asyncio.create_task(built.reserve(wish("mine", tenant="me")))
    answer = await asyncio.wait_for(flood[1], 0.04)
    assert isinstance(answer, Refusal)
    assert answer.kind == "queue_full"
    assert not flood[0].done()
    assert not mine.done()
    for task in (flood[0], mine):
        task.cancel()
    await asyncio.gather(flood[0], mine, return_exceptions=True)
    await built.check_health()


async def test_ill_health_shows() -> None:
    built = await service()
    next(iter(built._ledger._fleet)).charged_blocks += 1
    with pytest.raises(AssertionError, match="charged 1 blocks"):
        await built.check_health()


async def test_a_clock_that_stopped_shows() -> None:
    built = await service()

    def broken(now: float) -> list[Grant]:
        raise RuntimeError(f"stopped at {now}")

    built._ledger.tick = broken  # type: ignore[method-assign, assignment]  # to break it
    await asyncio.sleep(0.1)
    with pytest.raises(RuntimeError, match="stopped at"):
        await built.check_health()


def test_deployment_names_are_legal() -> None:
    assert deployment_name("org/model") == "ledger-org--model"
