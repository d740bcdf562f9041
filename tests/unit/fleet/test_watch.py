"""How often models are looked at, and what stays of one whose ledger is gone."""

from __future__ import annotations

import asyncio

import pytest

from deployments.fleet.watch import FleetWatch
from deployments.metrics.board import Observation
from tests.unit.fleet.scenes import Rep, observation

SEEN = observation(Rep("r", None))


class World:
    """A clock, and a model whose ledger answers when it is let."""

    def __init__(self) -> None:
        self.now = 0.0
        self.asked = 0
        self.answer: Observation | Exception | None = SEEN
        self.open = asyncio.Event()
        self.open.set()
        self.watch = FleetWatch({"m": self.observe}, clock=lambda: self.now)

    async def observe(self) -> Observation | None:
        self.asked += 1
        await self.open.wait()
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture
async def world() -> World:
    return World()


async def test_many_viewers_cost_one_look_a_second(world: World) -> None:
    for at, asked in ((0.0, 1), (0.5, 1), (1.0, 2), (1.9, 2), (2.1, 3)):
        world.now = at
        await asyncio.gather(*(world.watch.state() for _ in range(20)))
        assert world.asked == asked, at


async def test_a_viewer_who_leaves_takes_nobody_along(world: World) -> None:
    world.open.clear()
    first, second = (asyncio.create_task(world.watch.state()) for _ in range(2))
    while world.asked == 0:
        await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    world.open.set()
    (model,) = (await second).models
    assert (model.ledger, world.asked) == ("up", 1)


async def test_the_last_words_stay_and_age(world: World) -> None:
    await world.watch.state()
    world.answer = None
    ages = []
    for at in (1.0, 2.5):
        world.now = at
        (model,) = (await world.watch.state()).models
        assert (model.ledger, len(model.replicas)) == ("gone", 1)
        ages.append(model.age_s)
    assert ages == [1.0, 2.5]
    world.answer, world.now = SEEN, 4.0
    (model,) = (await world.watch.state()).models
    assert (model.ledger, model.age_s) == ("up", 0.0)


async def test_a_mistake_reaches_who_asked_and_the_next_one_asks_again(world: World) -> None:
    world.answer = RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"):
        await world.watch.state()
    world.answer = SEEN
    (model,) = (await world.watch.state()).models
    assert (model.ledger, world.asked) == ("up", 2)
