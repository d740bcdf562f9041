"""The router's choices, on replicas that are only names. Serve itself is in tests/integration."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest
from ray import cloudpickle
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve._private.request_router.common import PendingRequest
from ray.serve.exceptions import ReplicaUnavailableError

from deployments.protocol import GenerationRequest, Grant, Sampling
from deployments.routing import router as router_module
from deployments.routing.calls import NotSent, Rejected
from deployments.routing.router import GrantRouter, router_config

POOL = DeploymentID("pool", "app")


class Router(GrantRouter):
    """Asks no replica for its queue length: there is none."""

    async def _probe_queue_lens(self, *_: Any) -> Any:
        return []


def router(*names: str) -> Router:
    built = Router(deployment_id=POOL, handle_source=DeploymentHandleSource.UNKNOWN)
    tell(built, *names)
    return built


def tell(built: Router, *names: str) -> None:
    built.update_replicas([SimpleNamespace(replica_id=ReplicaID(name, POOL)) for name in names])  # type: ignore[misc]  # all that is read of a replica


def pending(replica: str | None) -> PendingRequest:
    grant = Grant("g", "q", "pool", replica, 1, 1, 1, 1e12) if replica else None
    args: list[Any] = [GenerationRequest("q", (1,), Sampling(1, 0), grant)] if grant else []
    return PendingRequest(args, {}, RequestMetadata("same", "same"))


async def chosen(built: Router, call: PendingRequest, *, is_retry: bool = False) -> str:
    return (await built._choose_replica_for_request(call, is_retry=is_retry)).replica_id.unique_id


async def test_each_call_goes_where_its_grant_says_though_they_share_an_id() -> None:
    built = router("a", "b", "c")
    names = ["a", "b", "c"] * 20
    assert await asyncio.gather(*(chosen(built, pending(name)) for name in names)) == names
    assert built.num_pending_requests == 0


async def test_calls_without_a_grant_go_anywhere() -> None:
    built = router("a", "b")
    assert {await chosen(built, pending(None)) for _ in range(50)} == {"a", "b"}


async def test_a_replica_that_left_fails_at_once() -> None:
    built = router("a", "b")
    tell(built, "b")
    start = time.monotonic()
    with pytest.raises(NotSent):
        await chosen(built, pending("a"))
    assert time.monotonic() - start < 0.1


async def test_its_errors_are_the_callers_classes_though_serve_pickles_the_router_by_value(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = router_config()
    monkeypatch.setattr(cloudpickle.cloudpickle, "_DYNAMIC_CLASS_TRACKER_BY_ID", {})  # as in another process
    served: Any = config.get_request_router_class()
    assert served is not GrantRouter
    monkeypatch.setattr(served, "_probe_queue_lens", Router._probe_queue_lens)
    built = served(deployment_id=POOL, handle_source=DeploymentHandleSource.UNKNOWN)
    tell(built, "a", "b")
    with pytest.raises(Rejected):
        await chosen(built, pending("a"), is_retry=True)
    tell(built, "b")
    with pytest.raises(NotSent):
        await chosen(built, pending("a"))


async def test_a_replica_that_serve_has_not_named_yet_is_waited_for() -> None:
    built = router("a")
    call = asyncio.create_task(chosen(built, pending("new")))
    await asyncio.sleep(0.01)
    tell(built, "a", "other")
    await asyncio.sleep(0.01)
    assert not call.done()
    tell(built, "a", "new")
    assert await asyncio.wait_for(call, 1.0) == "new"


async def test_the_wait_for_a_new_replica_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_module, "APPEAR_LIMIT_S", 0.05)
    with pytest.raises(NotSent):
        await chosen(router("a"), pending("never"))


async def test_a_second_attempt_of_serve_is_not_sent_elsewhere() -> None:
    built = router("a", "b")
    built.on_replica_actor_died(ReplicaID("a", POOL))
    with pytest.raises(ReplicaUnavailableError) as caught:
        await chosen(built, pending("a"), is_retry=True)
    assert not isinstance(caught.value, NotSent)  # the first attempt may have arrived


async def test_a_call_that_a_living_replica_rejects_is_told_from_its_death() -> None:
    built = router("a", "b")
    built.on_new_queue_len_info(ReplicaID("a", POOL), 24)  # what Serve does with the answer that rejects
    with pytest.raises(Rejected, match="replica a has too many calls") as caught:
        await chosen(built, pending("a"), is_retry=True)
    assert not isinstance(caught.value, ReplicaUnavailableError)


async def test_a_call_that_broke_on_its_way_may_have_arrived() -> None:
    built = router("a", "b")
    built.on_replica_actor_unavailable(ReplicaID("a", POOL))
    with pytest.raises(ReplicaUnavailableError):
        await chosen(built, pending("a"), is_retry=True)
    built.on_new_queue_len_info(ReplicaID("a", POOL), 24)
    with pytest.raises(Rejected):
        await chosen(built, pending("a"), is_retry=True)
    built.on_replica_actor_unavailable(ReplicaID("a", POOL))
    tell(built, "b")
    assert not built._unreachable


async def test_without_any_replica_calls_wait_for_one() -> None:
    built = router()
    call = asyncio.create_task(chosen(built, pending(None)))
    await asyncio.sleep(0.01)
    assert not call.done()
    tell(built, "a")
    assert await asyncio.wait_for(call, 1.0) == "a"


async def test_serves_own_paths_get_the_same_choice_and_back_off() -> None:
    built = router("a", "b")
    call = pending("b")
    (ranked,) = await built.choose_replicas(list(built.curr_replicas.values()), call)
    assert [replica.replica_id.unique_id for replica in ranked] == ["b"]
    assert call.routing_context.should_backoff
    assert await built.choose_replicas(list(built.curr_replicas.values()), pending("gone")) == [[]]


def test_serve_can_import_the_router_by_its_name() -> None:
    assert router_config().get_request_router_class() is GrantRouter
