"""Sends a replica's reports to the ledger: on change, at most every 100 ms, and a heartbeat each second.

While requests wait for room, the ledger asks for the ends of others sooner: what they free stands empty until it knows.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ray.serve.handle import DeploymentHandle

from deployments.metrics.vitals import ReplicaVitals
from deployments.protocol import ReportAnswer
from deployments.routing.admission import Admission
from deployments.routing.autoscaling import stats
from deployments.routing.calls import CallFailed, answer_of, method_of

logger = logging.getLogger(__name__)

LOOK_S = 0.02
EVERY_S = 0.1
HEARTBEAT_S = 1.0
ANSWER_LIMIT_S = 2.0
TOUCH_S = 3.0
"""After this long without an answer the ledger may have forgotten the replica; it does so after 16 s at the soonest."""


class ReportSender:
    """One report at a time, so that the ledger counts each ended request once.

    Args:
        admission: what to report.
        ledger: where to.
        vitals: what else to tell with the next report, if anything.
        stopping: whether the replica is being stopped; it drains from then on.
    """

    def __init__(
        self,
        admission: Admission,
        ledger: DeploymentHandle[Any],
        *,
        vitals: Callable[[], ReplicaVitals | None] = lambda: None,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self._admission = admission
        self._vitals = vitals
        self._stopping = stopping
        self._ledger_report = method_of(ledger, "report")
        self._reached = True
        self._answered_at: float | None = None
        self._waiting_tokens = 0
        self._end_within_ms: int | None = None

    async def run(self) -> None:
        """Report until cancelled. A ledger that doesn't answer is tried again each heartbeat."""
        clock = asyncio.get_running_loop().time
        sent_at = -HEARTBEAT_S
        while True:
            if self._stopping():
                self._admission.drain()
            if clock() - sent_at >= self._wait_s():
                sent_at = clock()
                await self.send()
            await asyncio.sleep(LOOK_S)

    def demand(self) -> dict[str, int]:
        """What the autoscaling policy is told: this replica's tokens, and those that wait for its pool."""
        admission = self._admission
        return stats(
            held_tokens=admission.held_tokens,
            capacity_tokens=admission.capacity_tokens,
            waiting_tokens=self._waiting_tokens,
        )

    def _wait_s(self) -> float:
        """Seconds from the last report to the next."""
        if not self._reached or not self._admission.changed:
            return HEARTBEAT_S
        if self._end_within_ms is None or not self._admission.ended:
            return EVERY_S
        return min(EVERY_S, self._end_within_ms / 1000)

    async def send(self) -> None:
        """Send one report and take in the answer."""
        state = replace(self._admission.report(), vitals=self._vitals())
        try:
            answer: ReportAnswer = await answer_of(self._ledger_report.remote(state), ANSWER_LIMIT_S)
        except CallFailed as error:
            if self._reached:
                logger.warning("replica %s can't reach its ledger: %s", state.replica_id, error)
            self._reached = False
            self._waiting_tokens = 0  # A pool must not grow by what waited once.
            return
        if not self._reached:
            logger.info("replica %s reaches its ledger again", state.replica_id)
        self._reached = True
        self._admission.acknowledge(state.sequence, answer.epoch)
        self._waiting_tokens, self._end_within_ms = answer.waiting_tokens, answer.end_within_ms
        for grant_id, expires_at in answer.revoked:
            self._admission.revoke(grant_id, expires_at)
        now = asyncio.get_running_loop().time()
        if self._answered_at is not None and now - self._answered_at > TOUCH_S:
            self._admission.lost_touch()
        self._answered_at = now
