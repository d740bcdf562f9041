"""A plan in outline: per device the parts that its memory goes to, in the order in which bars draw them.

Plain values without module names: small enough to send along with a replica's reports. `placement.svg` draws a plan
from the same parts in the same colours.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from placement.export import capacity, title
from placement.hardware import format_bytes
from placement.plan import Plan, Stage
from placement.reserve import Term

Kind = Literal["weights", "kv", "reserve", "free", "outside"]

WEIGHTS = {"embedding": "#5b88dd", "layers": "#2f6fd0", "head": "#7a68e0", "shared": "#75889f"}
KV = {"KV cache": "#1f9668"}
RESERVES = ("#96590f", "#c9761a", "#c4504a", "#b4489a", "#7a8c2a", "#8b6d5c", "#d0668a", "#5f7f86")
"""In the order in which a plan names its reserves. All colours have a contrast of 3 against white and #10151c."""
FREE, OUTSIDE = "free", "outside the budget"


@dataclass(frozen=True, slots=True)
class Part:
    """Some of a device's bytes."""

    kind: Kind
    name: str
    bytes: int
    why: str


@dataclass(frozen=True, slots=True)
class DeviceOutline:
    """One device; its parts add up to the greater of its memory and its budget."""

    device: int
    name: str
    layers: tuple[int, int]
    """First and past-last."""
    memory_bytes: int
    budget_bytes: int
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Outline:
    """One replica's plan."""

    title: str
    capacity: str
    devices: tuple[DeviceOutline, ...]


def outline(plan: Plan) -> Outline:
    """The outline of `plan`; parts without bytes are left out."""
    return Outline(title(plan), capacity(plan), tuple(_device(plan, stage) for stage in plan.stages))


def parts(plan: Plan, stage: Stage) -> tuple[Part, ...]:
    """Where all bytes of the stage's device go, in drawing order; some may be 0."""
    blocks = f"{plan.num_blocks:,} blocks and a scratch block of {format_bytes(stage.kv_block_bytes)}"
    outside = max(0, stage.gpu.memory_bytes - stage.budget_bytes)
    return (
        *_named("weights", stage.weights),
        Part("kv", "KV cache", plan.kv_bytes(stage), blocks),
        *_named("reserve", stage.reserve),
        Part("free", FREE, plan.unused_bytes(stage), "what the plan leaves of its budget"),
        Part("outside", OUTSIDE, outside, "taken by others, or above the cap"),
    )


def colours(shown: Iterable[Part]) -> dict[str, str | None]:
    """Every name with its colour, in drawing order; None: drawn by its style (what is not used)."""
    names = dict.fromkeys(part.name for part in shown if part.bytes)
    others = [name for name in names if name not in (*WEIGHTS, *KV, FREE, OUTSIDE)]
    fixed = WEIGHTS | KV | {name: RESERVES[i % len(RESERVES)] for i, name in enumerate(others)}
    order = [*WEIGHTS, *KV, *others, FREE, OUTSIDE]
    return {name: fixed.get(name) for name in sorted(names, key=order.index)}


def _device(plan: Plan, stage: Stage) -> DeviceOutline:
    return DeviceOutline(
        device=stage.device,
        name=stage.gpu.name,
        layers=stage.layers,
        memory_bytes=stage.gpu.memory_bytes,
        budget_bytes=stage.budget_bytes,
        parts=tuple(part for part in parts(plan, stage) if part.bytes),
    )


def _named(kind: Kind, terms: Iterable[Term]) -> tuple[Part, ...]:
    return tuple(Part(kind, term.name, term.bytes, term.why) for term in terms)
