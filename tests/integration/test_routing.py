"""Ledger, router and dispatcher on a real Ray Serve, with replicas that have no model."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
import time
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import pytest
import ray
from ray import serve
from ray.serve.context import _get_serve_request_context
from ray.serve.handle import DeploymentHandle

from deployments.errors import ContextLengthExceeded, Overloaded
from deployments.protocol import GenerationRequest, Sampling, TokenChunk
from deployments.routing.autoscaling import autoscaling_config
from deployments.routing.dispatch import ServeDispatcher
from deployments.routing.growth import ScaledPool
from deployments.routing.ledger_deployment import ledger_application
from deployments.routing.refusals import LedgerConfig
from deployments.routing.router import router_config
from tests.fakes.replica import BLOCK_SIZE, FakeReplica
from tests.waiting import wait_for

CAPACITY = 16
APP = "routing"


def make_request(key: str, prompt: int = 16, output: int = 16, step_ms: int = 20) -> GenerationRequest:
    return GenerationRequest(key, tuple(range(prompt)), Sampling(max_tokens=output, seed=step_ms))


async def run_to_end(dispatcher: ServeDispatcher, request: GenerationRequest, wait: float) -> list[TokenChunk]:
    chunks = await dispatcher.dispatch(request, wait_limit_s=wait)
    return [chunk async for chunk in chunks]


class FakeIngress:
    """Dispatches inside a Serve replica, as the API does, so that calls carry a parent request's context."""

    def __init__(self, ledger: DeploymentHandle, pool: DeploymentHandle) -> None:
        self._ledger, self._pool = ledger, pool
        self._dispatcher = ServeDispatcher("m", f"ingress-{os.getpid()}", ledger, {"default": pool})
        self._open: dict[str, AsyncGenerator[TokenChunk, None]] = {}

    async def many(self, requests: list[GenerationRequest], wait: float) -> tuple[str, list[Any]]:
        """All requests at once, as the choices of one HTTP request; returns the internal request id they share."""
        runs = (run_to_end(self._dispatcher, request, wait) for request in requests)
        results = await asyncio.gather(*runs, return_exceptions=True)
        return _get_serve_request_context()._internal_request_id, results

    async def start(self, request: GenerationRequest, wait: float) -> TokenChunk:
        """Dispatch and read the first chunk, leaving the stream open."""
        self._open[request.request_id] = chunks = await self._dispatcher.dispatch(request, wait_limit_s=wait)
        return await anext(chunks)

    async def rest(self, key: str) -> list[TokenChunk]:
        return [chunk async for chunk in self._open.pop(key)]

    async def close(self, key: str) -> None:
        await self._open.pop(key).aclose()

    async def ready(self) -> bool:
        return await self._dispatcher.is_ready()

    async def view(self) -> Any:
        return await self._ledger.snapshot.remote()

    async def observe(self) -> dict[str, tuple[str, int, int, int, int]]:
        seen: dict[str, Any] = {}
        for _ in range(30):
            answer = await self._pool.observe.remote()
            seen[answer[0]] = answer
        return seen


def application(name: str, config: LedgerConfig, *, capacity: int = CAPACITY, **options: Any) -> DeploymentHandle:
    """The ingress of an application with a ledger and a pool of fake replicas; `options` are the pool's."""
    ledger = ledger_application(config)
    usual = {"max_ongoing_requests": 10_000, "ray_actor_options": {"num_cpus": 0.01}}
    pool = serve.deployment(
        name="pool", request_router_config=router_config(), graceful_shutdown_timeout_s=1, **(usual | options)
    )(FakeReplica).bind(ledger, capacity)
    front = serve.deployment(name="front", max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0.01})
    return serve.run(front(FakeIngress).bind(ledger, pool), name=name, route_prefix=None)


@pytest.fixture(scope="module")
def ingress() -> Iterator[DeploymentHandle]:
    folder = tempfile.mkdtemp(prefix="hr")
    ray.init(num_cpus=2, include_dashboard=False, _temp_dir=folder, log_to_driver=False)
    handle = application(APP, LedgerConfig("m", expected_replicas=2, queue_limit=64), num_replicas=2)
    try:
        wait_for(lambda: sum(r.sellable for r in handle.view.remote().result().replicas) == 2, 20)
        yield handle
    finally:
        serve.shutdown()
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def free(ingress: DeploymentHandle) -> bool:
    """Whether the living replicas hold nothing and the ledger has promised nothing on them."""
    view = ingress.view.remote().result()
    held = [seen[2] for seen in ingress.observe.remote().result().values()]
    return sum(r.charged_blocks for r in view.replicas if r.sellable) == 0 and view.waiting == 0 and sum(held) == 0


def finished(chunks: Any, output: int) -> bool:
    if isinstance(chunks, BaseException):
        raise chunks
    ids = [token for chunk in chunks for token in chunk.token_ids]
    ends = [chunk.finish_reason for chunk in chunks if chunk.finish_reason]
    return ids == list(range(1, output + 1)) and ends == ["length"] and chunks[-1].finish_reason == "length"


def test_choices_of_one_request_run_side_by_side_and_never_over_capacity(ingress: DeploymentHandle) -> None:
    # 40 requests of 2 blocks over 2 replicas of 16 blocks: at most 16 run at once
    requests = [make_request(f"many-{k}") for k in range(40)]
    shared, results = ingress.many.remote(requests, 30.0).result(timeout_s=60)
    assert shared
    assert all(finished(chunks, 16) for chunks in results)
    observed = ingress.observe.remote().result()
    assert len(observed) == 2
    assert all(most <= CAPACITY for _, _, _, most, _ in observed.values())
    assert all(served >= 10 for _, _, _, _, served in observed.values()), "one replica got nearly everything"
    wait_for(lambda: free(ingress), 30)


def test_refusals_arrive_as_the_errors_of_the_api(ingress: DeploymentHandle) -> None:
    too_long = make_request("too-long", prompt=CAPACITY * BLOCK_SIZE, output=1)
    full = make_request("fill-a", prompt=226, output=30), make_request("fill-b", prompt=226, output=30)
    _, (refused,) = ingress.many.remote([too_long], 5.0).result()
    assert isinstance(refused, ContextLengthExceeded)
    assert str(CAPACITY * BLOCK_SIZE) in refused.message
    for request in full:
        ingress.start.remote(request, 5.0).result()
    _, (late,) = ingress.many.remote([make_request("late")], 0.1).result()
    assert isinstance(late, Overloaded)
    assert late.retry_after_s is not None
    assert late.retry_after_s >= 1
    for request in full:
        assert ingress.rest.remote(request.request_id).result()[-1].finish_reason == "length"
    wait_for(lambda: free(ingress), 30)


def test_closing_a_stream_frees_its_blocks_at_once(ingress: DeploymentHandle) -> None:
    ingress.start.remote(make_request("leaves", prompt=100, output=100, step_ms=600), 5.0).result()  # a minute long
    assert not free(ingress)
    ingress.close.remote("leaves").result()
    wait_for(lambda: free(ingress), 20)


def test_a_client_that_leaves_while_it_waits_leaves_no_trace(ingress: DeploymentHandle) -> None:
    for key in ("hold-a", "hold-b"):
        ingress.start.remote(make_request(key, prompt=200, output=56, step_ms=1000), 5.0).result()
    call = ingress.many.remote([make_request(f"gone-{k}", prompt=100) for k in range(3)], 30.0)
    wait_for(lambda: ingress.view.remote().result().waiting == 3, 20)
    call.cancel()
    wait_for(lambda: ingress.view.remote().result().waiting == 0, 20)
    for key in ("hold-a", "hold-b"):
        ingress.close.remote(key).result()
    wait_for(lambda: free(ingress), 30)


def test_killed_replica(ingress: DeploymentHandle) -> None:
    """Its request goes on at the other, which serves later ones too, and a new replica takes part."""
    assert ingress.ready.remote().result()
    ingress.start.remote(make_request("victim", output=200), 5.0).result()
    (victim,) = [seen for seen in ingress.observe.remote().result().values() if seen[2] > 0]
    os.kill(victim[1], signal.SIGKILL)
    _, results = ingress.many.remote([make_request(f"after-{k}") for k in range(12)], 20.0).result(timeout_s=40)
    assert all(finished(chunks, 16) for chunks in results)
    rest = ingress.rest.remote("victim").result()
    ids = [token for chunk in rest for token in chunk.token_ids]
    assert ids == list(range(ids[0], 201))
    assert [chunk.finish_reason for chunk in rest if chunk.finish_reason] == ["length"]
    wait_for(lambda: sum(r.sellable for r in ingress.view.remote().result().replicas) == 2, 30)
    _, results = ingress.many.remote([make_request(f"healed-{k}") for k in range(12)], 20.0).result(timeout_s=40)
    assert all(finished(chunks, 16) for chunks in results)
    wait_for(lambda: free(ingress), 30)


def test_killed_ledger_is_rebuilt_from_reports(ingress: DeploymentHandle) -> None:
    before = ingress.view.remote().result().epoch
    ingress.start.remote(make_request("survivor", prompt=50, output=200, step_ms=200), 5.0).result()
    actors = ray.util.list_named_actors(all_namespaces=True)
    (name,) = [a for a in actors if "ledger-m" in a["name"]]
    ray.kill(ray.get_actor(**name), no_restart=True)
    _, results = ingress.many.remote([make_request(f"anew-{k}") for k in range(12)], 30.0).result(timeout_s=60)
    assert all(finished(chunks, 16) for chunks in results)
    assert ingress.view.remote().result().epoch > before

    def survivor_is_charged() -> bool:  # 50 prompt tokens and more; its replica may not have reported yet
        return sum(r.charged_blocks for r in ingress.view.remote().result().replicas) >= 5

    wait_for(survivor_is_charged, 20)
    ingress.close.remote("survivor").result()
    wait_for(lambda: free(ingress), 30)
    assert all(most <= CAPACITY for _, _, _, most, _ in ingress.observe.remote().result().values())


@pytest.fixture(scope="module")
def narrow(ingress: DeploymentHandle) -> Iterator[DeploymentHandle]:  # noqa: ARG001  it has started Serve
    """The ingress of another application: Serve lets one call at once into its only replica, and its ledger knows no
    limit but blocks."""
    handle = application("narrow", LedgerConfig("n"), max_ongoing_requests=1)
    wait_for(lambda: handle.ready.remote().result(), 30)
    yield handle
    serve.delete("narrow")


def charged(ingress: DeploymentHandle) -> int:
    """Blocks that the ledger of one replica has promised or knows to be held."""
    (replica,) = ingress.view.remote().result().replicas
    return int(replica.charged_blocks)


def test_a_call_that_serve_rejects_costs_no_block_and_is_tried_again(narrow: DeploymentHandle) -> None:
    narrow.start.remote(make_request("first", prompt=24, output=150, step_ms=1000), 5.0).result()
    alone = charged(narrow)
    _, (rejected,) = narrow.many.remote([make_request("rejected")], 1.0).result(timeout_s=30)
    assert isinstance(rejected, Overloaded), rejected
    assert "too many calls" in rejected.message
    assert rejected.retry_after_s
    wait_for(lambda: charged(narrow) == alone, 8)  # by the ingress's word: the grants would expire after 13 s
    waits = narrow.many.remote([make_request("second")], 60.0)
    narrow.close.remote("first").result()
    _, (second,) = waits.result(timeout_s=60)
    assert finished(second, 16)
    wait_for(lambda: charged(narrow) == 0, 30)


def test_a_client_that_leaves_before_the_replicas_word_costs_no_block_for_long(narrow: DeploymentHandle) -> None:
    ((_, pid, *_),) = narrow.observe.remote().result().values()
    os.kill(pid, signal.SIGSTOP)
    try:
        call = narrow.many.remote([make_request("on its way")], 30.0)
        wait_for(lambda: charged(narrow) > 0, 20)
        time.sleep(0.5)  # until it was sent
        call.cancel()
        time.sleep(0.5)
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_for(lambda: charged(narrow) == 0, 8)  # by the replica's word: the grant would expire after 13 s


@pytest.fixture
def scaled(ingress: DeploymentHandle) -> Iterator[DeploymentHandle]:  # noqa: ARG001  it has started Serve
    """The ingress of another application on the same Serve: its pool has no replica, and gets two at most."""
    default = ScaledPool("default", min_replicas=0, max_replicas=2, upscale_delay_s=0.0)
    yield application(
        "scaled",
        LedgerConfig("s", expected_replicas=0, scaled=(default,)),
        autoscaling_config=autoscaling_config(
            min_replicas=0,
            max_replicas=2,
            target_percent=80,
            slack_percent=20,
            upscale_delay_s=0.0,
            downscale_delay_s=1.0,
            downscale_to_zero_delay_s=1.0,
        ),
    )
    serve.delete("scaled")


def test_a_pool_grows_from_none_and_goes_back(scaled: DeploymentHandle) -> None:
    def running() -> int:
        states = serve.status().applications["scaled"].deployments["pool"].replica_states
        return next((number for state, number in states.items() if state == "RUNNING"), 0)

    assert running() == 0
    _, (first,) = scaled.many.remote([make_request("first")], 60.0).result(timeout_s=60)
    assert finished(first, 16), "it waited for a replica, and was served"
    whole = [make_request(key, prompt=156, output=100, step_ms=1000) for key in ("a", "b")]
    for request in whole:  # each fills a replica: the second waits for another one
        assert scaled.start.remote(request, 60.0).result(timeout_s=60).token_ids == (1,)
    assert running() == 2
    for request in whole:
        scaled.close.remote(request.request_id).result()
    wait_for(lambda: running() == 0, 60)
    assert scaled.ready.remote().result(), "a request would be served"
    _, (again,) = scaled.many.remote([make_request("again")], 60.0).result(timeout_s=60)
    assert finished(again, 16)
