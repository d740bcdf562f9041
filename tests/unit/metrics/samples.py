"""One replica, one ingress and one ledger's view, with a value in every field."""

from __future__ import annotations

from typing import Any

from deployments.metrics.histogram import Buckets
from deployments.metrics.meter import IngressMeter
from deployments.metrics.vitals import GrantCounts, IngressVitals, ReplicaVitals
from deployments.routing.forecast import ForecastError
from deployments.routing.view import LedgerView, ReplicaView

VIEW = LedgerView(
    model="m",
    epoch=1,
    warming=False,
    waiting=4,
    waiting_tokens=400,
    expected_output_tokens=256,
    forecast=ForecastError(2, forecast_ms=3000, waited_ms=2500, error_ms=700),
    replicas=(
        ReplicaView("r1", "default", 1, 16, 100, charged_blocks=40, held_blocks=30, promises=5, sellable=True),
        ReplicaView("r2", "default", 1, 16, 100, charged_blocks=0, held_blocks=0, promises=0, sellable=False),
    ),
)


def replica_vitals(**changes: Any) -> ReplicaVitals:
    fields: dict[str, Any] = {
        "held_blocks": 30,
        "cached_blocks": 12,
        "running": 5,
        "waiting": 1,
        "preemptions": 2,
        "prompt_tokens": 1000,
        "cached_tokens": 160,
        "output_tokens": 500,
        "steps": Buckets((0.01, 0.1), (5, 3, 0), 0.2),
        "busy_s": (6.0, 4.0),
        "predicted_bytes": (1000, 1000),
        "measured_bytes": (990, 960),
        "grants": GrantCounts(50, 9, 2),
    }
    return ReplicaVitals(**(fields | changes))


def ingress_vitals(ingress_id: str) -> IngressVitals:
    meter = IngressMeter(ingress_id)
    meter.of("m").outcomes["ok"] += 3
    for seconds in (0.2, 0.1, 500.0):
        meter.of("m").first_token.add(seconds)
    meter.of("m").token_gaps.add(0.02, 4)
    meter.of("m").queue.add(0.003)
    meter.of(None).outcomes["invalid_api_key"] += 1
    return meter.vitals()
