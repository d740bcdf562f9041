"""A replica's vitals, put together from its engine, its plan and its grants."""

from __future__ import annotations

from deployments.engine.tally import EngineTally
from deployments.metrics.vitals import GrantCounts, ReplicaVitals
from placement.outline import Outline
from placement.plan import Plan


def vitals_of(
    tally: EngineTally,
    plan: Plan,
    *,
    cached_blocks: int,
    preemptions: int,
    grants: GrantCounts,
    outline: Outline | None,
) -> ReplicaVitals:
    """What the replica tells its ledger about once a second."""
    last = tally.last
    predicted = [stage.weight_bytes + stage.reserve_bytes + plan.kv_bytes(stage) for stage in plan.stages]
    return ReplicaVitals(
        held_blocks=last.held_blocks,
        cached_blocks=cached_blocks,
        running=last.running,
        waiting=last.waiting,
        preemptions=preemptions,
        prompt_tokens=tally.prompt_tokens,
        cached_tokens=tally.cached_tokens,
        output_tokens=tally.output_tokens,
        steps=tally.steps.buckets(),
        busy_s=last.busy_s,
        predicted_bytes=tuple(predicted) if last.gpu_bytes else (),
        measured_bytes=last.gpu_bytes,
        grants=grants,
        outline=outline,
    )
