"""What the fleet page shows, put together from what each model's ledger observed. Pure.

`dataclasses.asdict(FleetState)` is the JSON of `/fleet/state`. Counts are blocks or tokens as named, sizes bytes,
durations seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from deployments.metrics.board import Observation
from deployments.metrics.vitals import ReplicaVitals
from deployments.routing.view import ReplicaView
from placement.outline import DeviceOutline, Outline, Part, colours

SCHEMA = "headroom.fleet/1"

LedgerStatus = Literal["up", "gone", "unknown"]
"""It answers; it did before; it never has."""
ReplicaStatus = Literal["serving", "starting", "draining", "lost"]
"""Gets requests; not yet known to this ledger's epoch; finishes its streams; silent, or found gone."""


@dataclass(frozen=True, slots=True)
class Sight:
    """What an ingress last saw of one model."""

    model: str
    answers: bool
    """Whether the ledger answered when it was last asked."""
    seen: Observation | None = None
    """Its last answer."""
    seen_at: float = 0.0
    """When that came; seconds of the clock that `fleet_state` is given."""


@dataclass(frozen=True, slots=True)
class PartBar:
    """One part of a device's memory."""

    kind: str
    name: str
    bytes: int
    why: str
    colour: str | None
    """#rrggbb; None: what is not used."""


@dataclass(frozen=True, slots=True)
class DeviceBar:
    """One device of a replica: its plan, and what was measured."""

    device: int
    name: str
    layers: tuple[int, int]
    """First and last."""
    memory_bytes: int
    budget_bytes: int
    parts: tuple[PartBar, ...]
    predicted_bytes: int | None
    measured_bytes: int | None
    """Both None where nothing is measured (the CPU)."""


@dataclass(frozen=True, slots=True)
class PlanBars:
    """A replica's plan."""

    title: str
    capacity: str
    devices: tuple[DeviceBar, ...]


@dataclass(frozen=True, slots=True)
class Kv:
    """A replica's KV blocks. Held, promised, cached and empty add up to the capacity."""

    block_size: int
    capacity_blocks: int
    held_blocks: int
    """By requests."""
    promised_blocks: int
    """Granted, and not held yet."""
    cached_blocks: int
    """Kept by the prefix cache alone: given up when the room is needed."""
    empty_blocks: int
    headroom_blocks: int
    """By the ledger: neither held nor promised; negative when requests outgrew their grants."""


@dataclass(frozen=True, slots=True)
class ReplicaCard:
    """One replica."""

    id: str
    pool: str
    status: ReplicaStatus
    silent_s: float
    kv: Kv
    grants: int
    running: int | None
    waiting: int | None
    """In its engine; as `running` None until its first vitals."""
    preemptions: int | None
    tokens_per_s: float | None
    """Output of the last seconds; None until it has been told twice."""
    plan: PlanBars | None
    """None until it has been told."""


@dataclass(frozen=True, slots=True)
class PoolRow:
    """One pool."""

    name: str
    replicas: int
    serving: int
    waiting: int
    """Requests that insist on this pool."""


@dataclass(frozen=True, slots=True)
class ModelCard:
    """One model."""

    name: str
    ledger: LedgerStatus
    age_s: float | None
    """Of everything here; None while the ledger has never answered."""
    warming: bool
    """The ledger is new, and waits for the replicas' reports before it grants anything."""
    expected_replicas: int
    missing_replicas: int
    """Expected, and neither serving nor starting: they load, wait for devices, or were lost."""
    waiting: int
    """Requests, of all pools and of none in particular."""
    waiting_tokens: int
    pools: tuple[PoolRow, ...]
    replicas: tuple[ReplicaCard, ...]


@dataclass(frozen=True, slots=True)
class FleetState:
    """The whole service."""

    schema: str
    models: tuple[ModelCard, ...]


def fleet_state(sights: Sequence[Sight], now: float) -> FleetState:
    """All models at one instant; `now` in seconds of the clock of `Sight.seen_at`."""
    painted = colours(_all_parts(sights))
    return FleetState(SCHEMA, tuple(_model(sight, painted, now) for sight in sights))


def _all_parts(sights: Iterable[Sight]) -> Iterable[Part]:
    outlines = (outline for sight in sights if sight.seen for outline in sight.seen.outlines.values())
    return (part for outline in outlines for device in outline.devices for part in device.parts)


def _model(sight: Sight, painted: dict[str, str | None], now: float) -> ModelCard:
    seen = sight.seen
    if seen is None:
        return ModelCard(sight.model, "unknown", None, False, 0, 0, 0, 0, (), ())
    view, age_s = seen.view, max(0.0, now - sight.seen_at)
    order = sorted(view.replicas, key=lambda replica: (replica.pool, replica.replica_id))
    cards = tuple(_replica(replica, seen, painted, 0.0 if sight.answers else age_s) for replica in order)
    present = sum(card.status in ("serving", "starting") for card in cards)
    return ModelCard(
        name=sight.model,
        ledger="up" if sight.answers else "gone",
        age_s=round(age_s, 1),
        warming=view.warming,
        expected_replicas=seen.expected_replicas,
        missing_replicas=max(0, seen.expected_replicas - present),
        waiting=view.waiting,
        waiting_tokens=view.waiting_tokens,
        pools=_pools(cards, dict(view.waiting_by_pool)),
        replicas=cards,
    )


def _pools(cards: Sequence[ReplicaCard], waiting: dict[str | None, int]) -> tuple[PoolRow, ...]:
    names = sorted({card.pool for card in cards} | {name for name in waiting if name is not None})
    return tuple(
        PoolRow(
            name=name,
            replicas=sum(card.pool == name for card in cards),
            serving=sum(card.pool == name and card.status == "serving" for card in cards),
            waiting=waiting.get(name, 0),
        )
        for name in names
    )


def _replica(view: ReplicaView, seen: Observation, painted: dict[str, str | None], older_s: float) -> ReplicaCard:
    vitals, outline = seen.replicas.get(view.replica_id), seen.outlines.get(view.replica_id)
    rate = seen.output_rates.get(view.replica_id)
    return ReplicaCard(
        id=view.replica_id,
        pool=view.pool,
        status=_status(view),
        silent_s=round(view.silent_s + older_s, 1),
        kv=_kv(view, vitals),
        grants=view.promises,
        running=vitals.running if vitals else None,
        waiting=vitals.waiting if vitals else None,
        preemptions=vitals.preemptions if vitals else None,
        tokens_per_s=None if rate is None else round(rate, 1),
        plan=_plan(outline, vitals, painted) if outline else None,
    )


def _status(view: ReplicaView) -> ReplicaStatus:
    if not view.alive:
        return "lost"
    if view.draining:
        return "draining"
    return "serving" if view.sellable else "starting"


def _kv(view: ReplicaView, vitals: ReplicaVitals | None) -> Kv:
    """The ledger counts what is granted as held; what is held indeed is in the vitals, which are up to a second older:
    where the two don't fit, what is held goes before what is promised, and both before what is cached."""
    capacity = view.capacity_blocks
    held = min(capacity, vitals.held_blocks if vitals else view.held_blocks)
    promised = min(capacity - held, max(0, view.charged_blocks - held))
    cached = min(capacity - held - promised, vitals.cached_blocks if vitals else 0)
    return Kv(
        block_size=view.block_size,
        capacity_blocks=capacity,
        held_blocks=held,
        promised_blocks=promised,
        cached_blocks=cached,
        empty_blocks=capacity - held - promised - cached,
        headroom_blocks=capacity - view.charged_blocks,
    )


def _plan(outline: Outline, vitals: ReplicaVitals | None, painted: dict[str, str | None]) -> PlanBars:
    predicted = dict(enumerate(vitals.predicted_bytes if vitals else ()))
    measured = dict(enumerate(vitals.measured_bytes if vitals else ()))
    devices = tuple(
        _device(device, painted, predicted.get(stage), measured.get(stage))
        for stage, device in enumerate(outline.devices)
    )
    return PlanBars(outline.title, outline.capacity, devices)


def _device(
    device: DeviceOutline, painted: dict[str, str | None], predicted: int | None, measured: int | None
) -> DeviceBar:
    return DeviceBar(
        device=device.device,
        name=device.name,
        layers=(device.layers[0], device.layers[1] - 1),
        memory_bytes=device.memory_bytes,
        budget_bytes=device.budget_bytes,
        parts=tuple(PartBar(p.kind, p.name, p.bytes, p.why, painted[p.name]) for p in device.parts if p.bytes),
        predicted_bytes=predicted,
        measured_bytes=measured,
    )
