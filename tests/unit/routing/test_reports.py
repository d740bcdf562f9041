from __future__ import annotations

import asyncio
from typing import Any

import pytest
from ray.exceptions import RayError

from deployments.metrics.pacing import seldom
from deployments.protocol import CachedGranules, Grant, ReplicaState, ReportAnswer
from deployments.routing import reports
from deployments.routing.admission import Admission
from deployments.routing.autoscaling import WAITING
from deployments.routing.reports import ReportSender
from tests.unit.metrics.samples import replica_vitals


class LedgerHandle:
    """Counts reports; fails while told to."""

    def __init__(self) -> None:
        self.heard: list[ReplicaState] = []
        self.failing = False
        self.end_within_ms: int | None = None
        self.revoked: tuple[tuple[str, float], ...] = ()

    def options(self, *, method_name: str, **_: Any) -> LedgerHandle:
        assert method_name == "report"
        return self

    def remote(self, state: ReplicaState) -> Any:
        async def answer() -> ReportAnswer:
            if self.failing:
                raise RayError("down")
            self.heard.append(state)
            return ReportAnswer(7, 48, self.revoked, self.end_within_ms)

        return answer()


def sender() -> tuple[Admission, LedgerHandle, ReportSender]:
    own = Admission(replica_id="r0", pool="p", epoch=1, block_size=16, capacity_blocks=10, max_context=160)
    ledger = LedgerHandle()
    return own, ledger, ReportSender(own, ledger)  # type: ignore[arg-type]  # a fake ledger


@pytest.fixture(autouse=True)
def ten_times_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOOK_S", "EVERY_S", "HEARTBEAT_S"):
        monkeypatch.setattr(reports, name, getattr(reports, name) / 10)


async def test_a_new_ledger_hears_twice_at_once_then_by_heartbeat() -> None:
    _, ledger, reporting = sender()
    task = asyncio.create_task(reporting.run())
    await asyncio.sleep(0.05)
    assert [state.ledger_epoch for state in ledger.heard] == [0, 7]
    await asyncio.sleep(0.25)
    task.cancel()
    assert 3 <= len(ledger.heard) <= 5


async def test_changes_are_reported_at_most_each_100_ms() -> None:
    own, ledger, reporting = sender()
    task = asyncio.create_task(reporting.run())
    await asyncio.sleep(0.05)
    before = len(ledger.heard)
    for k in range(20):
        own.take_up(Grant(f"g{k}", "q", "p", "r0", 1, 7, 1, 1e12), 0.0)
        await asyncio.sleep(0.002)
    await asyncio.sleep(0.03)
    task.cancel()
    assert len(ledger.heard[-1].held) == 20
    assert 2 <= len(ledger.heard) - before <= 8


async def test_ends_are_reported_sooner_while_requests_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports, "EVERY_S", 600.0)
    monkeypatch.setattr(reports, "HEARTBEAT_S", 600.0)
    own, ledger, reporting = sender()
    for name in "ab":
        own.take_up(Grant(name, "q", "p", "r0", 1, 7, 1, 1e12), 0.0)
    ledger.end_within_ms = 20
    await reporting.send()
    await reporting.send()  # the first answer told of a ledger, which was a change
    task = asyncio.create_task(reporting.run())
    own.hold("a", 5)  # a change, but no end
    await asyncio.sleep(0.1)
    before = len(ledger.heard)
    ledger.end_within_ms = None
    own.end("a", prompt_tokens=16, output_tokens=1)
    while len(ledger.heard) == before:
        await asyncio.sleep(0.005)
    assert [grant_id for grant_id, _, _ in ledger.heard[-1].ended] == ["a"]
    own.end("b", prompt_tokens=16, output_tokens=1)  # nobody waits any more, by that report's answer
    await asyncio.sleep(0.1)
    task.cancel()
    assert len(ledger.heard) == before + 1


async def test_a_ledger_that_may_have_forgotten_the_replica_hears_all_of_its_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own, ledger, reporting = sender()
    own.note_granules(CachedGranules(used=(1,), idle=(2,)))
    for _ in range(4):
        await reporting.send()
    assert [state.granules.whole for state in ledger.heard] == [True, True, False, False]
    monkeypatch.setattr(reports, "TOUCH_S", 0.01)
    await asyncio.sleep(0.02)
    for _ in range(2):
        await reporting.send()
    assert [state.granules.whole for state in ledger.heard[4:]] == [False, True]
    assert ledger.heard[-1].granules == CachedGranules(whole=True, used=(1,), idle=(2,))


async def test_a_ledger_that_comes_back_hears_what_ended_meanwhile() -> None:
    own, ledger, reporting = sender()
    own.take_up(Grant("g", "q", "p", "r0", 1, 7, 1, 1e12), 0.0)
    own.end("g", prompt_tokens=1, output_tokens=2)
    ledger.failing = True
    await reporting.send()
    ledger.failing = False
    await reporting.send()
    await reporting.send()
    assert [state.ended for state in ledger.heard] == [(("g", 1, 2),), ()]


async def test_a_replica_that_is_stopped_drains_and_says_so_at_once() -> None:
    own, ledger, _ = sender()
    stopping: list[bool] = []
    reporting = ReportSender(own, ledger, stopping=lambda: bool(stopping))  # type: ignore[arg-type]  # a fake ledger
    task = asyncio.create_task(reporting.run())
    while len(ledger.heard) < 2:
        await asyncio.sleep(0.001)
    stopping.append(True)
    while not ledger.heard[-1].draining:
        await asyncio.sleep(0.001)
    task.cancel()
    assert not any(state.draining for state in ledger.heard[:-1])


async def test_an_idle_replica_tells_how_it_stands_again_and_again() -> None:
    own, ledger, _ = sender()
    vitals = seldom(replica_vitals, every_s=0.1)
    reporting = ReportSender(own, ledger, vitals=vitals)  # type: ignore[arg-type]  # a fake ledger
    task = asyncio.create_task(reporting.run())
    async with asyncio.timeout(10):
        while sum(state.vitals is not None for state in ledger.heard) < 4:
            await asyncio.sleep(0.01)
    task.cancel()


async def test_what_the_ledger_revokes_is_refused_and_told_at_once() -> None:
    own, ledger, reporting = sender()
    ledger.revoked = (("g", 1e12),)
    await reporting.send()
    await reporting.send()
    assert [state.ended for state in ledger.heard] == [(), (("g", 0, 0),)]
    assert "left" in (own.take_up(Grant("g", "q", "p", "r0", 1, 7, 1, 1e12), 0.0) or "")


async def test_what_waits_for_the_pool_comes_with_the_answer() -> None:
    _, ledger, reporting = sender()
    assert reporting.demand()[WAITING] == 0
    await reporting.send()
    assert reporting.demand()[WAITING] == 48
    ledger.failing = True
    await reporting.send()
    assert reporting.demand()[WAITING] == 0, "what waited once, before the ledger was gone"
