"""Caps under which transformers' own `device_map="sequential"` splits a model as a plan does.

Loading takes the plan's explicit `device_map`, beside which `max_memory` is ignored. These caps are for those who can
pass `max_memory` alone. They mean what transformers (5.x) makes of them, which is not what a plan's budgets mean:

- modules are taken in the order in which the model registers them, a whole subtree at once where it fits, and a
  device that was left is never returned to;
- only weights and buffers count, quantised weights at half a byte (4 bits) or one byte (int8) without their
  quantisation state, and tied weights once;
- bitsandbytes' methods get nine tenths of every cap;
- on the first device the largest module that is still to be placed must fit as well, in case it is offloaded.

A stage then ends where it should for every cap from the least that takes its last module up to the least that takes
the next layer too; the middle of the two is returned, half a layer away from either.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise

from placement.errors import PlacementError
from placement.footprint import Footprint, Module, Tensor
from placement.plan import Plan

_SHARE = {"nf4": (9, 10), "fp4": (9, 10), "int8": (9, 10)}
_HALVES = {"nf4": 1, "fp4": 1, "int8": 2}
"""Half bytes of one quantised weight, as transformers counts."""


@dataclass(frozen=True, slots=True)
class _Node:
    """A subtree of modules: units of placement [start, end) in registration order."""

    start: int
    end: int
    children: tuple[_Node, ...] = ()


@dataclass(frozen=True, slots=True)
class _Model:
    """What transformers sees: a tree over units, and their sizes in half bytes."""

    roots: tuple[_Node, ...]
    before: tuple[int, ...]
    """Sizes of all units before the i-th, summed."""
    largest: tuple[int, ...]
    """The largest unit from the i-th on."""
    share: tuple[int, int]
    """Of a cap, what modules may fill: numerator and denominator."""

    def reach(self, start: int, cap: int, *, main: bool) -> int:
        """The first unit that does not go on a device of `cap` bytes whose first is `start`; `main`: the device keeps
        room for the largest module after the one being placed."""
        queue, used = self._pending(start), 0
        while queue:
            node = queue.pop(0)
            size = self.before[node.end] - self.before[node.start]
            needed = used + size + (self.largest[node.end] if main else 0)
            if needed * self.share[1] <= 2 * cap * self.share[0]:
                used += size
            elif node.children:
                queue = [*node.children, *queue]
            else:
                return node.start
        return len(self.largest) - 1

    def _pending(self, start: int) -> list[_Node]:
        """What is left to place from `start` on: everything, or the units beside and after one that did not fit."""
        nodes = list(self.roots)
        while start and nodes[0].start < start:
            first = nodes.pop(0)
            nodes = [child for child in first.children if child.end > start] + nodes
        while start and nodes[0].children:
            nodes = [*nodes[0].children, *nodes[1:]]
        return nodes


def sequential_max_memory(plan: Plan, footprint: Footprint) -> dict[int, int]:
    """`max_memory` in bytes per GPU that makes `from_pretrained(device_map="sequential")` reproduce `plan`.

    Layers, embeddings, norm and head end up where the plan has them; the rotary tables, of which a plan gives every
    stage a copy, wherever the model registers them.

    Args:
        plan: stages on GPUs.
        footprint: what the plan was solved for.

    Raises:
        PlacementError: transformers can't split the model so whatever the caps; load with `device_map` instead.
    """
    if footprint.head or footprint.embeddings:
        part = "head" if footprint.head else "embedding"
        raise PlacementError(
            f"{footprint.model} has a quantised {part}, which transformers does not load so; leave it out"
        )
    _check_devices(plan, footprint)
    units = sorted(footprint.modules, key=lambda module: module.order)
    stages = {name: i for i, stage in enumerate(plan.stages) for name in stage.modules}
    planned = [None if unit.role == "shared" else stages[unit.name] for unit in units]
    if len(plan.stages) > 1:
        _check_order(footprint, units, planned)
    model = _model(units, footprint.quantization)
    caps, start = {}, 0
    for i, stage in enumerate(plan.stages):
        end = next((j for j, where in enumerate(planned) if where is not None and where > i), len(units))
        caps[stage.device] = _cap(model, start, end, stage.device, units, main=i == 0)
        start = end
    return caps


def _check_devices(plan: Plan, footprint: Footprint) -> None:
    if (plan.model, plan.quantization, plan.dtype) != (footprint.model, footprint.quantization, footprint.dtype):
        raise PlacementError(
            f"the plan is for {plan.model} in {plan.quantization} and {plan.dtype}, the footprint of {footprint.model} "
            f"in {footprint.quantization} and {footprint.dtype}; give the footprint that the plan was solved for"
        )
    if any(stage.gpu.device_type != "cuda" for stage in plan.stages):
        raise _cannot("it has one CPU, which it can't cut into stages")
    devices = [stage.device for stage in plan.stages]
    if devices != sorted(devices):
        raise _cannot(f"it fills devices in ascending order, and the stages run on {', '.join(map(str, devices))}")


def _check_order(footprint: Footprint, units: list[Module], planned: list[int | None]) -> None:
    if split := [layer.name for layer in footprint.layers if not layer.whole]:
        raise _cannot(f"it may split {split[0]} over devices")
    owners: dict[str, str] = {}
    for unit in units:
        for tensor in unit.tensors:
            if (other := owners.setdefault(tensor.storage, unit.name)) != unit.name:
                raise _cannot(f"it puts {unit.name} beside {other}, to which it is tied")
    placed = [(unit.name, stage) for unit, stage in zip(units, planned, strict=True) if stage is not None]
    for (before, later), (name, stage) in pairwise(placed):
        if stage < later:
            raise _cannot(f"the model registers {before} before {name}, which runs on an earlier stage")


def _cap(model: _Model, start: int, end: int, device: int, units: list[Module], *, main: bool) -> int:
    """The middle of the caps for which a device takes units [start, end) and no more."""
    most = (model.before[-1] + model.largest[0]) * model.share[1]

    def least(wanted: Callable[[int], bool]) -> int:
        low, high = -1, most
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if wanted(middle) else (middle, high)
        return high

    enough = least(lambda cap: model.reach(start, cap, main=main) >= end)
    if end == len(units):
        return enough + model.largest[start] // 4
    too_much = least(lambda cap: model.reach(start, cap, main=main) > end)
    if enough >= too_much:
        raise _cannot(
            f"a cap of device {device} that takes {units[end - 1].name} takes {units[end].name} too, "
            "since the largest module still to be placed must fit beside what is there"
        )
    return (enough + too_much) // 2


def _model(units: list[Module], quantization: str) -> _Model:
    counted: set[str] = set()
    sizes = []
    for unit in units:
        fresh = [tensor for tensor in unit.tensors if tensor.storage not in counted]
        counted |= {tensor.storage for tensor in fresh}
        sizes.append(sum(_halves(tensor, quantization) for tensor in fresh))
    return _Model(
        roots=_nodes([unit.name.split(".") for unit in units], 0, 0),
        before=tuple(accumulate(sizes, initial=0)),
        largest=tuple(accumulate([0, *reversed(sizes)], max))[::-1],
        share=_SHARE.get(quantization, (1, 1)),
    )


def _halves(tensor: Tensor, quantization: str) -> int:
    if tensor.linear and quantization in _HALVES:
        return _HALVES[quantization] * tensor.elements
    return 2 * tensor.bytes


def _nodes(names: list[list[str]], depth: int, start: int) -> tuple[_Node, ...]:
    """The subtrees of consecutive units, by the part of their names at `depth`."""
    nodes = []
    for _, group in groupby(names, key=lambda parts: parts[depth]):
        below = list(group)
        end = start + len(below)
        leaf = len(below) == 1 and len(below[0]) == depth + 1
        nodes.append(_Node(start, end, () if leaf else _nodes(below, depth + 1, start)))
        start = end
    return tuple(nodes)


def _cannot(reason: str) -> PlacementError:
    return PlacementError(
        f"device_map=\"sequential\" can't reproduce this plan: {reason}; load with the plan's device_map"
    )
