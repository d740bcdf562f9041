"""The ledger as a Serve deployment of one replica per model: the clock, the futures and Serve around `ledger.py`."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Mapping

from ray import serve
from ray.serve import Application

from deployments.metrics.board import Board, Observation
from deployments.protocol import (
    Grant,
    IngressNotice,
    LedgerNews,
    Refusal,
    ReplicaState,
    ReportAnswer,
    ReserveRequest,
)
from deployments.routing.ledger import Ledger, Queued
from deployments.routing.refusals import LedgerConfig
from deployments.routing.router import router_config
from deployments.routing.turns import Outcome
from deployments.routing.view import LedgerView

logger = logging.getLogger(__name__)

TICK_S = 0.05
MAX_CALLS = 100_000
"""Serve's limit on calls in the ledger at once; each waiting request is one. `queue_limit` is the limit that counts."""


class LedgerService:
    """Answers ingresses and replicas. Lives on one event loop, so the state machine needs no lock."""

    def __init__(self, config: LedgerConfig) -> None:
        epoch = time.time_ns()
        self._ledger = Ledger(config, epoch=epoch, now=time.time(), rng=random.Random(epoch))
        self._answers: dict[str, asyncio.Future[Outcome]] = {}
        self._board = Board()
        self._ticking: asyncio.Task[None] | None = None
        logger.info("ledger of %s starts in epoch %d", config.model, epoch)

    async def reserve(self, request: ReserveRequest) -> Grant | Refusal:
        """Wait for a grant or a refusal. Cancelling the call ends the waiting and gives back a grant just made."""
        self._keep_time()
        outcome = self._ledger.reserve(request, time.time())
        self._answer(self._ledger.displaced())
        self._board.count(outcome)
        if not isinstance(outcome, Queued):
            return outcome
        answer: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._answers[request.request_id] = answer
        try:
            return await answer
        except asyncio.CancelledError:
            self._ledger.cancel(request.request_id, time.time())
            self._admit()
            raise
        finally:
            del self._answers[request.request_id]

    async def report(self, state: ReplicaState) -> ReportAnswer:
        """Take in a replica's report."""
        self._keep_time()
        epoch = self._ledger.report(state, time.time())
        self._board.hear_replica(state, time.time())
        self._admit()
        waiting = self._ledger.waiting_tokens(state.pool)
        return ReportAnswer(epoch, waiting, self._ledger.revoked(state.replica_id), self._ledger.end_within_ms())

    async def notice(self, notice: IngressNotice) -> LedgerNews:
        """Take in an ingress's notice."""
        self._keep_time()
        self._ledger.notice(notice, time.time())
        self._board.hear_ingress(notice, time.time())
        self._admit()
        return self._ledger.news()

    async def snapshot(self) -> LedgerView:
        """The ledger as it is now."""
        self._keep_time()
        return self._ledger.view(time.time())

    async def observe(self) -> Observation:
        """What there is to show of this model."""
        return self._board.observe(await self.snapshot(), self._ledger.config.expected_replicas, time.time())

    async def check_health(self) -> None:
        """Called by Serve each health check period: keeps time passing, and fails when the sums are wrong."""
        self._keep_time()
        self._ledger.check_integrity(prefixes=False)

    def _admit(self) -> None:
        self._answer(self._ledger.admit(time.time()))

    def _answer(self, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            self._board.count(outcome)
            answer = self._answers.get(outcome.request_id)
            if answer is not None and not answer.done():
                answer.set_result(outcome)
            elif isinstance(outcome, Grant):
                self._ledger.release(outcome.grant_id, time.time())

    def _keep_time(self) -> None:
        """Start the clock, or raise what stopped it: Serve then finds the ledger unhealthy and replaces it."""
        if self._ticking is None:
            self._ticking = asyncio.get_running_loop().create_task(self._tick_forever())
        elif self._ticking.done():
            self._ticking.result()

    async def _tick_forever(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._answer(self._ledger.tick(time.time()))


def ledger_application(config: LedgerConfig, resources: Mapping[str, float] | None = None) -> Application:
    """The Serve application node of one model's ledger, to be bound into ingress and replicas.

    Args:
        config: of the ledger.
        resources: custom Ray resources that it asks for.
    """
    deploy = serve.deployment(
        name=deployment_name(config.model),
        num_replicas=1,
        max_ongoing_requests=MAX_CALLS,
        ray_actor_options={"num_cpus": 0.01, "resources": dict(resources or {})},
        # One replica: nothing to choose, so no probing of its queue before each call.
        request_router_config=router_config(),
        logging_config={"enable_access_log": False},
        health_check_period_s=2,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=1,
        graceful_shutdown_wait_loop_s=0.1,
    )
    return deploy(LedgerService).bind(config)


def deployment_name(model: str) -> str:
    """The ledger's deployment name; Serve allows no slash or hash in it."""
    return "ledger-" + model.replace("/", "--").replace("#", "-")
