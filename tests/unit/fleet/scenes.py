"""Services to look at: observations of fleets, made from plans and a few figures per replica."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deployments.metrics.board import Observation
from deployments.routing.forecast import ForecastError
from deployments.routing.view import LedgerView, ReplicaView
from placement.hardware import Gpu
from placement.outline import outline
from placement.plan import Plan, Stage
from placement.reserve import Term
from tests.unit.metrics.samples import replica_vitals

GB = 10**9


def plan_on(*sizes: int, cuda: bool = True) -> Plan:
    """A plan for GPUs of so many GB: a fifth weights, 2 GB reserve, and 1,000 blocks."""
    stages = tuple(_stage(device, size, len(sizes), cuda=cuda) for device, size in enumerate(sizes))
    return Plan("llama", "nf4", False, "bfloat16", "bfloat16", 16, 1000, 8192, stages)


def _stage(device: int, size: int, count: int, *, cuda: bool) -> Stage:
    layers = (8 * device, 8 * (device + 1))
    weights = [Term("layers", size * GB // 6, "8 layers")]
    weights += [Term("embedding", GB // 2, "embed")] if device == 0 else []
    weights += [Term("head", GB // 2, "norm, head")] if device == count - 1 else []
    reserve = [Term("activations", GB // 4, "one step"), Term("workspace", GB // 3, "the largest: logits")]
    gpu_only = [("context", 0.7), ("graphs", 0.2), ("fragmentation", 0.3), ("buffers", 0.35)]
    reserve = [Term(name, int(part * GB), f"of {name}") for name, part in gpu_only if cuda] + reserve
    budget = size * GB * 95 // 100
    taken = sum(term.bytes for term in (*weights, *reserve))
    kind = "cuda" if cuda else "cpu"
    return Stage(
        device=device,
        gpu=Gpu(f"{size} GB card" if cuda else f"cpu{device}", size * GB, device_type=kind),  # type: ignore[arg-type]  # one of the two
        layers=layers,
        modules=(),
        copies=(),
        weight_bytes=sum(term.bytes for term in weights),
        reserve=tuple(reserve),
        kv_block_bytes=(budget - taken) * 9 // 10 // 1001,
        budget_bytes=budget,
        weights=tuple(weights),
    )


@dataclass(frozen=True)
class Rep:
    """A replica of a scene; counts are blocks of 1,000."""

    id: str
    plan: Plan | None
    pool: str = "default"
    held: int = 0
    promised: int = 0
    cached: int = 0
    alive: bool = True
    draining: bool = False
    sellable: bool = True
    silent_s: float = 0.1
    rate: float | None = 0.0
    told: bool = True
    """It has sent vitals."""


def observation(
    *replicas: Rep,
    expected: int | None = None,
    waiting: Sequence[tuple[str | None, int]] = (),
    warming: bool = False,
    measured: float | None = None,
) -> Observation:
    """`measured`: memory taken over memory planned."""
    vitals = {}
    for rep in replicas:
        if rep.told:
            stages = rep.plan.stages if rep.plan and measured else ()
            planned = tuple(stage.budget_bytes for stage in stages)
            vitals[rep.id] = replica_vitals(
                held_blocks=rep.held,
                cached_blocks=rep.cached,
                predicted_bytes=planned,
                measured_bytes=tuple(int(size * (measured or 0)) for size in planned),
            )
    view = LedgerView(
        model="m",
        epoch=1,
        warming=warming,
        waiting=sum(count for _, count in waiting),
        waiting_tokens=400 * sum(count for _, count in waiting),
        expected_output_tokens=256,
        replicas=tuple(_view(rep) for rep in replicas),
        forecast=ForecastError(),
        waiting_by_pool=tuple(waiting),
    )
    return Observation(
        view=view,
        expected_replicas=len(replicas) if expected is None else expected,
        replicas=vitals,
        ingresses=(),
        refusals=(),
        outlines={rep.id: outline(rep.plan) for rep in replicas if rep.plan},
        output_rates={rep.id: rep.rate for rep in replicas if rep.rate is not None},
    )


def _view(rep: Rep) -> ReplicaView:
    return ReplicaView(
        replica_id=rep.id,
        pool=rep.pool,
        epoch=1,
        block_size=16,
        capacity_blocks=1000,
        charged_blocks=rep.held + rep.promised,
        held_blocks=rep.held + rep.promised,
        promises=5,
        sellable=rep.sellable and rep.alive and not rep.draining,
        alive=rep.alive,
        draining=rep.draining,
        silent_s=rep.silent_s,
    )


ONE = {
    "llama-8b": observation(Rep("6m2kq0ab", plan_on(24), held=220, promised=90, cached=130, rate=312.4), measured=1.004)
}
UNEQUAL = {
    "llama-70b": observation(
        Rep("x81hw3pe", plan_on(80, 48, 24, 16), held=610, promised=140, cached=30, rate=841.0),
        waiting=((None, 12),),
        measured=1.04,
    )
}
TWELVE = {
    "org/mixed-model": observation(
        *(
            Rep(
                f"replica{i:02}",
                plan_on(24) if i % 2 else plan_on(80),
                pool="small" if i % 2 else "large",
                held=(i * 83) % 900,
                promised=(i * 37) % 100,
                cached=(i * 13) % 60,
                draining=i == 4,
                sellable=i != 8,
                alive=i != 7,
                silent_s=9.3 if i == 7 else 0.2,
                rate=None if i == 8 else 17.5 * i,
            )
            for i in range(12)
        ),
        expected=14,
        waiting=((None, 3), ("small", 2)),
    )
}
HOSTILE_TEXT = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
HOSTILE = {f"m {HOSTILE_TEXT}": observation(Rep(f"r {HOSTILE_TEXT}", plan_on(24), pool=f"p {HOSTILE_TEXT}", held=10))}
