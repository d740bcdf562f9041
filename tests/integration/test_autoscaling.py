"""A pool that follows demand on a real Ray Serve: from none to some and back, with replicas that have no model."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments.protocol import GenerationRequest, Sampling
from deployments.routing.autoscaling import autoscaling_config
from deployments.routing.dispatch import ServeDispatcher
from deployments.routing.growth import ScaledPool
from deployments.routing.ledger_deployment import ledger_application
from deployments.routing.refusals import LedgerConfig
from deployments.routing.router import router_config
from tests.fakes.replica import BLOCK_SIZE, FakeReplica

CAPACITY = 16
LIMIT_S = 60.0
"""Of each wait: starting a replica takes seconds on a loaded machine."""


class Front:
    """An ingress without HTTP."""

    def __init__(self, ledger: DeploymentHandle, pool: DeploymentHandle) -> None:
        self._ledger = ledger
        self._dispatcher = ServeDispatcher("m", f"ingress-{os.getpid()}", ledger, {"default": pool})
        self._dispatcher.start()

    async def run(self, keys: list[str], prompt: int, output: int, step_ms: int) -> list[int]:
        """Tokens that each of the requests brought, which come all at once."""

        async def one(key: str) -> int:
            request = GenerationRequest(key, tuple(range(prompt)), Sampling(max_tokens=output, seed=step_ms))
            chunks = await self._dispatcher.dispatch(request, wait_limit_s=LIMIT_S)
            return sum([len(chunk.token_ids) async for chunk in chunks])

        return await asyncio.gather(*(one(key) for key in keys))

    async def view(self) -> Any:
        return await self._ledger.snapshot.remote()

    async def ready(self) -> bool:
        return await self._dispatcher.is_ready()


@pytest.fixture(scope="module")
def front() -> Iterator[DeploymentHandle]:
    folder = tempfile.mkdtemp(prefix="hr")
    ray.init(num_cpus=2, include_dashboard=False, _temp_dir=folder, log_to_driver=False)
    scaled = ScaledPool("default", min_replicas=0, max_replicas=2, upscale_delay_s=0.0)
    ledger = ledger_application(LedgerConfig("m", expected_replicas=0, scaled=(scaled,)))
    pool = serve.deployment(
        name="pool",
        max_ongoing_requests=10_000,
        ray_actor_options={"num_cpus": 0.01},
        request_router_config=router_config(),
        graceful_shutdown_timeout_s=1,
        autoscaling_config=autoscaling_config(
            min_replicas=0,
            max_replicas=2,
            target_percent=80,
            slack_percent=20,
            upscale_delay_s=0.0,
            downscale_delay_s=4.0,
            downscale_to_zero_delay_s=4.0,
        ),
    )(FakeReplica).bind(ledger, CAPACITY)
    deployment = serve.deployment(name="front", max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0.01})
    try:
        yield serve.run(deployment(Front).bind(ledger, pool), name="autoscaling", route_prefix=None)
    finally:
        serve.shutdown()
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def running() -> int:
    """Replicas of the pool that run, by Serve's own account."""
    states = serve.status().applications["autoscaling"].deployments["pool"].replica_states
    return next((number for state, number in states.items() if state == "RUNNING"), 0)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end, f"not so within {LIMIT_S:g} s"
        time.sleep(0.1)


def test_from_none_to_as_many_as_demand_asks_for_and_back(front: DeploymentHandle) -> None:
    assert running() == 0
    assert front.ready.remote().result(), "a request would be served"
    first = front.run.remote(["first"], 16, 16, 10)
    assert first.result(timeout_s=LIMIT_S) == [16], "it waited for a replica, and was served"
    until(lambda: running() == 1)

    # 3 requests of a whole replica each, of which 2 can run once there are two replicas
    whole = CAPACITY * BLOCK_SIZE
    many = front.run.remote([f"many-{k}" for k in range(3)], whole - 100, 100, 80)
    until(lambda: running() == 2)
    assert many.result(timeout_s=LIMIT_S) == [100] * 3

    until(lambda: running() == 0)
    view = front.view.remote().result()
    assert (view.waiting, sum(replica.charged_blocks for replica in view.replicas)) == (0, 0)
    again = front.run.remote(["again"], 16, 16, 10)
    assert again.result(timeout_s=LIMIT_S) == [16]
