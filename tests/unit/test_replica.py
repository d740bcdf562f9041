"""The replica between Serve and its engine: what it takes up, streams, reports and counts. Neither is started."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deployments import replica as replica_module
from deployments.engine.messages import EngineSpec, Started
from deployments.engine.tally import EngineTally
from deployments.errors import EngineFailed
from deployments.metrics.vitals import ReplicaVitals
from deployments.protocol import (
    NO_CHANGE,
    PROTOCOL_VERSION,
    REFUSED,
    CachedGranules,
    GenerationRequest,
    Grant,
    Sampling,
    TokenChunk,
)
from deployments.replica import Replica
from deployments.routing.admission import Admission
from deployments.settings import ModelSettings, PoolSettings
from placement.hardware import Gpu
from placement.outline import outline
from placement.plan import Plan, Stage

GPU = Gpu("Toy", 10**6, speed=1)
STAGE = Stage(0, GPU, (0, 1), (), (), 0, (), kv_block_bytes=10, budget_bytes=10**6)
PLAN = Plan("m", "nf4", False, "float32", "float32", 4, 100, 256, (STAGE,))


class FakeEngine:
    """Answers with the chunks it was given; after `endless` ones it waits for ever."""

    def __init__(self, on_report: Callable[[], None]) -> None:
        self.on_report = on_report
        self.failure: str | None = None
        self.held: dict[str, int] = {}
        self.held_news: tuple[tuple[str, int], ...] = ()
        self.shared_blocks, self.granules = 0, NO_CHANGE
        self.pid, self.cached_blocks, self.preemptions = 4711, 5, 6
        self.tally = EngineTally()
        self.script: list[TokenChunk] = []
        self.endless = False
        self.aborted: list[str] = []
        self.spec: EngineSpec | None = None
        self.stopped = False

    async def start(self, spec: EngineSpec) -> Started:
        self.spec = spec
        return Started(PLAN, "torch", 1.0)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        ended = False
        try:
            for chunk in self.script:
                ended = chunk.finish_reason is not None
                yield chunk
            if self.endless:
                await asyncio.Event().wait()
        finally:
            if not ended:
                self.aborted.append(request.request_id)

    def say(self, *held: tuple[str, int]) -> None:
        """A step's report: what has changed of `held`."""
        self.held.update(held)
        self.held_news = held
        self.on_report()

    def stop(self) -> None:
        self.stopped = True


class FakeSender:
    """Reports to nobody until it breaks."""

    broken: asyncio.Event
    first: ReplicaVitals

    def __init__(
        self, admission: Admission, ledger: Any, *, vitals: Callable[[], Any], stopping: Callable[[], bool]
    ) -> None:
        assert not stopping()
        FakeSender.first = vitals()  # at most one a second: the first is due at once
        assert (admission.replica_id, ledger) == ("r1", "the ledger")
        FakeSender.broken = asyncio.Event()

    async def run(self) -> None:
        await FakeSender.broken.wait()
        raise RuntimeError("reports stopped")


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A started replica and its engine."""
    context = SimpleNamespace(replica_id=SimpleNamespace(unique_id="r1"))
    monkeypatch.setattr(replica_module, "EngineClient", FakeEngine)
    monkeypatch.setattr(replica_module, "ReportSender", FakeSender)
    monkeypatch.setattr(replica_module, "stop_flag", lambda: lambda: False)
    monkeypatch.setattr(replica_module.serve, "get_replica_context", lambda: context)
    monkeypatch.setattr(replica_module.store, "fetch", lambda *_, **__: SimpleNamespace(path=tmp_path))
    replica = Replica(ModelSettings(name="m", source="demo"), PoolSettings(), 3, "the ledger")  # type: ignore[arg-type]  # no handle
    await replica.start()
    yield SimpleNamespace(replica=replica, engine=replica._engine, admission=replica._admission)
    replica.stop()


def granted(world: Any, name: str = "a", **changes: Any) -> GenerationRequest:
    grant = Grant(f"grant-{name}", name, "default", "r1", world.admission.epoch, 1, 3, time.time() + 60)
    return GenerationRequest(name, (1, 2, 3), Sampling(max_tokens=4, seed=1), grant=replace(grant, **changes))


async def stream(world: Any, request: GenerationRequest) -> list[TokenChunk]:
    return [chunk async for chunk in world.replica.generate(request)]


async def test_starts_its_engine_with_the_pools_settings(world: Any, tmp_path: Path) -> None:
    spec = world.engine.spec
    assert (spec.name, spec.model_dir, spec.replicas_here, spec.pool) == ("m", tmp_path, 3, PoolSettings())
    state = world.admission.report()
    assert (state.replica_id, state.block_size, state.capacity_blocks, state.max_context) == ("r1", 4, 100, 256)
    assert state.max_requests == PoolSettings().max_requests == 512


async def test_tells_its_plan_in_outline_with_its_first_vitals_and_then_seldom(world: Any) -> None:
    assert FakeSender.first.steps.total == 0
    assert FakeSender.first.outline == outline(PLAN)
    assert world.replica._vitals().outline is None


async def test_says_first_that_it_took_the_grant_up_and_counts_at_the_end(world: Any) -> None:
    script = [TokenChunk("a", (7, 8)), TokenChunk("a", (9,), finish_reason="length")]
    world.engine.script = script
    assert await stream(world, granted(world)) == [TokenChunk("a"), *script]
    state = world.admission.report()
    assert state.ended == (("grant-a", 3, 3),)
    assert state.held == ()
    assert world.engine.aborted == []


async def test_refusals_say_so_in_the_first_and_only_chunk(world: Any) -> None:
    wrong = [
        (granted(world, replica_epoch=0), "epoch"),
        (granted(world, expires_at=time.time() - 1), "expired"),
        (replace(granted(world), grant=None), "no grant"),
        (replace(granted(world), version=0), f"is of protocol 0, this replica reads {PROTOCOL_VERSION}"),
    ]
    for request, reason in wrong:
        (chunk,) = await stream(world, request)
        assert chunk.finish_reason == "error"
        assert str(chunk.error).startswith(REFUSED)
        assert reason in str(chunk.error)
    assert world.admission.report().ended == ()


async def test_an_id_that_runs_is_refused_and_keeps_running(world: Any) -> None:
    world.engine.endless = True
    first = world.replica.generate(granted(world))
    await anext(first)
    (chunk,) = await stream(world, granted(world, grant_id="another"))
    assert "running here already" in str(chunk.error)
    assert world.admission.report().held == (("grant-a", 3),)
    await first.aclose()


async def test_leaving_aborts_and_ends_the_grant(world: Any) -> None:
    world.engine.script, world.engine.endless = [TokenChunk("a", (7,))], True
    running = world.replica.generate(granted(world))
    assert [await anext(running), await anext(running)] == [TokenChunk("a"), TokenChunk("a", (7,))]
    await running.aclose()
    assert world.engine.aborted == ["a"]
    assert world.admission.report().ended == (("grant-a", 3, 1),)


async def test_cancellation_while_it_waits_for_the_engine(world: Any) -> None:
    world.engine.endless = True
    reader = asyncio.create_task(stream(world, granted(world)))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert world.engine.aborted == ["a"]
    assert world.admission.report().held == ()


async def test_blocks_held_beyond_the_grant_are_reported(world: Any) -> None:
    world.engine.endless = True
    running = world.replica.generate(granted(world))
    await anext(running)
    world.engine.say(("a", 9), ("of a request that left", 2))
    assert world.admission.report().held == (("grant-a", 9),)
    status = await world.replica.status()
    assert (status.held_blocks, status.requests, status.engine_pid, status.cached_blocks) == (11, 1, 4711, 5)
    await running.aclose()


async def test_what_requests_share_is_reported_once_and_never_with_one_that_left(world: Any) -> None:
    world.engine.endless = True
    streams = [world.replica.generate(granted(world, key)) for key in ("a", "b")]
    for running in streams:
        await anext(running)
    world.engine.shared_blocks, world.engine.granules = 8, CachedGranules(used=(1, 2))
    world.engine.say(("a", 9), ("b", 9))
    report = world.admission.report()
    assert (report.held, report.shared_blocks) == ((("grant-a", 9), ("grant-b", 9)), 8)
    assert report.granules.used == (1, 2)
    assert (await world.replica.status()).held_blocks == 10
    await streams[0].aclose()  # the engine's last report still counts it, so it may be whom b shares with
    report = world.admission.report()
    assert (report.held, report.shared_blocks) == ((("grant-b", 9),), 0)
    await streams[1].aclose()


async def test_the_engine_is_told_the_granule_of_the_model(world: Any) -> None:
    assert world.engine.spec.granule_tokens == 64


async def test_a_dead_engine_refuses_and_is_unhealthy(world: Any) -> None:
    await world.replica.check_health()
    world.engine.failure = "it was killed"
    (chunk,) = await stream(world, granted(world))
    assert chunk.error == f"{REFUSED}the engine failed: it was killed"
    with pytest.raises(EngineFailed, match="it was killed"):
        await world.replica.check_health()


async def test_a_dead_engine_drains_its_replica_at_once(world: Any) -> None:
    assert not world.admission.draining
    world.engine.failure = "it was killed"
    world.engine.on_report()
    assert world.admission.report().draining


async def test_a_resumed_request_counts_what_was_produced_before_as_output(world: Any) -> None:
    world.engine.script = [TokenChunk("a", (7, 8), finish_reason="length")]
    await stream(world, replace(granted(world), prompt_ids=(1, 2, 3, 4, 5, 6), resumed_tokens=2))
    assert world.admission.report().ended == (("grant-a", 4, 4),)


async def test_a_replica_that_can_not_report_is_unhealthy(world: Any) -> None:
    FakeSender.broken.set()
    await asyncio.sleep(0.01)
    with pytest.raises(RuntimeError, match="reports stopped"):
        await world.replica.check_health()


async def test_stop_ends_engine_and_reports(world: Any) -> None:
    world.replica.stop()
    await asyncio.sleep(0.01)
    assert world.engine.stopped
    assert world.replica._reporting.cancelled()


async def test_reports_tell_of_preemptions(world: Any) -> None:
    assert world.admission.report().preemptions == 0
    world.engine.on_report()
    assert world.admission.report().preemptions == 6
