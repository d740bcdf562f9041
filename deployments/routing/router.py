"""The Serve request router of a pool: a granted request goes to the replica that its grant names, or fails at once.

The ledger has already decided and waited, so nothing is left to choose, to probe or to queue here. Serve's own routing
loop matches waiting calls by the HTTP request's id, which the choices of one request share; overriding the step that
turns one pending call into one replica leaves that loop unused. Written against Ray 2.60 (pinned in pyproject.toml).

Serve pickles this module by value: in a caller's process, a class that is defined here is another than the one that the
caller imports from here. Hence what callers are to recognise comes from other modules.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import Any

from ray.serve._private.common import ReplicaID
from ray.serve._private.request_router.common import PendingRequest
from ray.serve._private.request_router.replica_wrapper import RunningReplica
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import RayServeException, ReplicaUnavailableError
from ray.serve.request_router import RequestRouter

from deployments.protocol import GenerationRequest, Grant
from deployments.routing.calls import NotSent, Rejected

APPEAR_LIMIT_S = 2.0
"""A replica may report to the ledger before Serve has told this process that it runs."""
RETRY_PAUSE_S = 0.05


class GrantRouter(RequestRouter):
    """Sends by grant; calls without one (health, snapshots) go to any replica."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._seen: set[str] = set()
        """Unique ids of all replicas that ever ran: one that is missing now is gone, one never seen may still come."""
        self._unreachable: set[ReplicaID] = set()
        """Replicas that a call broke on its way to, and that have not answered since."""

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Serve's news of the running replicas."""
        self._seen.update(replica.replica_id.unique_id for replica in replicas)
        self._unreachable.intersection_update(replica.replica_id for replica in replicas)
        super().update_replicas(replicas)

    def on_replica_actor_unavailable(self, replica_id: ReplicaID) -> None:
        """Serve's news of a call that broke on its way; the call is chosen for again before any other news comes."""
        self._unreachable.add(replica_id)
        super().on_replica_actor_unavailable(replica_id)

    def on_new_queue_len_info(self, replica_id: ReplicaID, num_ongoing_requests: int) -> None:
        """Serve's news of a replica's answer, whether it let the call in or not."""
        self._unreachable.discard(replica_id)
        super().on_new_queue_len_info(replica_id, num_ongoing_requests)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The named replica, or all in random order for a call without a grant. Empty when it isn't there."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        grant = grant_of(pending_request)
        if grant is not None:
            return [[r for r in candidate_replicas if r.replica_id.unique_id == grant.replica_id]]
        return [random.sample(candidate_replicas, len(candidate_replicas))]

    async def _choose_replica_for_request(
        self, pending_request: PendingRequest, *, is_retry: bool = False
    ) -> RunningReplica:
        grant = grant_of(pending_request)
        if grant is None:
            return await self._any_replica(is_retry)
        if is_retry:  # whether to try again is the ledger's to say
            raise self._why_again(grant.replica_id)
        return await self._named_replica(grant.replica_id)

    async def _named_replica(self, unique_id: str) -> RunningReplica:
        key = ReplicaID(unique_id, self._deployment_id)
        give_up_at = self._event_loop.time() + APPEAR_LIMIT_S
        while (replica := self._replicas.get(key)) is None:
            left = give_up_at - self._event_loop.time()
            if unique_id in self._seen or left <= 0:
                raise NotSent(unique_id)
            await self._news(left)
        return replica

    def _why_again(self, unique_id: str) -> RayServeException:
        """What became of a call that Serve wants to send again: rejected, or lost, perhaps after it had arrived."""
        key = ReplicaID(unique_id, self._deployment_id)
        if key in self._replicas and key not in self._unreachable:
            return Rejected(f"replica {unique_id} has too many calls, or is about to stop")
        return ReplicaUnavailableError(unique_id)

    async def _any_replica(self, is_retry: bool) -> RunningReplica:
        if is_retry:
            await asyncio.sleep(RETRY_PAUSE_S)
        while not self._replicas_list:
            await self._news(None)
        return random.choice(self._replicas_list)

    async def _news(self, limit_s: float | None) -> None:
        """Wait until Serve tells of a change, or for `limit_s` seconds."""
        self._replicas_updated_event.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                await self._replicas_updated_event.wait()


def grant_of(pending_request: PendingRequest | None) -> Grant | None:
    """The grant in a call's first positional argument, if it has one."""
    if pending_request is None or not pending_request.args:
        return None
    request = pending_request.args[0]
    return request.grant if isinstance(request, GenerationRequest) else None


def router_config() -> RequestRouterConfig:
    """What a pool's deployment passes as `request_router_config`."""
    options: dict[str, Any] = {"request_router_class": f"{__name__}.{GrantRouter.__name__}"}
    return RequestRouterConfig(**options)
