"""A question with its running sums, so that any run of layers on any device is priced in a few additions."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import accumulate, product
from math import gcd, lcm, prod
from typing import NamedTuple

from placement.errors import PlacementError
from placement.footprint import Footprint
from placement.kv import kv_dtype_bytes
from placement.question import Question
from placement.reserve import Reserve, reserve

MOST_STEPS = 1200
"""Choices of a next device that order="best" may weigh: 8 GPUs all different make 1,024, two kinds of 16 make 544."""

_LAST_RESORT_SLOWNESS = 20
"""A last resort's time per multiply-add over the slowest GPU's: main memory is that much slower, roughly."""


class Cut(NamedTuple):
    """Layers [start, end) on one device."""

    device: int
    start: int
    end: int


class Step(NamedTuple):
    """The choice of a device as the next in the pipeline: it leads from one set of devices already passed to another.

    In the given order the sets are the prefixes of the devices, and there is one choice each.
    """

    before: int
    device: int
    after: int


@dataclass(frozen=True, slots=True)
class Problem:
    """A question, priced. Times are in the smallest unit that keeps them whole on all devices."""

    question: Question
    reserves: tuple[Reserve, ...]
    weights: tuple[int, ...]
    """Bytes held with the layers before the i-th and nowhere else; so are `kv` (bytes of one block), `state` (bytes of
    all sequences' recurrent state) and `work` (multiply-adds)."""
    kv: tuple[int, ...]
    state: tuple[int, ...]
    work: tuple[int, ...]
    tied: tuple[tuple[tuple[int, ...], int], ...]
    """Layers that share storage, and its bytes: held once on each device that has one of them."""
    everywhere: int
    """Bytes that every stage holds."""
    slowness: tuple[int, ...]
    """Time of one multiply-add per device."""
    fences: tuple[tuple[int, ...], ...]
    """Per device and start, the first layer from there on that the device may not hold."""
    steps: tuple[Step, ...]
    """Every choice of a next device, sorted so that a set's ways in come before its ways out."""

    @classmethod
    def of(cls, question: Question) -> Problem:
        """Price `question`.

        Raises:
            PlacementError: order="best" over more kinds of device than can be tried.
        """
        footprint, workload = question.footprint, question.workload
        per_token = kv_dtype_bytes(workload.kv_dtype) * workload.block_size
        layers = question.kv
        alone, tied, everywhere = _storages(footprint)
        work = [layer.work for layer in footprint.layers]
        for layer, module in footprint.beside:
            work[layer] += module.work
        of_type = {
            device_type: reserve(footprint, workload, device_type=device_type, devices=len(question.devices))
            for device_type in {gpu.device_type for gpu in question.devices}
        }
        reserves = tuple(of_type[gpu.device_type] for gpu in question.devices)
        fences = tuple(_fence(question, device) for device in range(len(question.devices)))
        slowness = _slowness(question)
        return cls(
            question=question,
            reserves=reserves,
            weights=_running(alone),
            kv=_running(kv.elements_per_token * per_token for kv in layers),
            state=_running(kv.state_bytes(footprint.dtype) * workload.max_sequences for kv in layers),
            work=_running(work),
            tied=tied,
            everywhere=everywhere,
            slowness=slowness,
            fences=fences,
            steps=_steps(question, tuple(zip(question.budgets, slowness, reserves, fences, strict=True))),
        )

    @property
    def layers(self) -> int:
        """How many layers there are."""
        return len(self.work) - 1

    @property
    def sets(self) -> int:
        """How many sets of devices already passed there are."""
        return self.steps[-1].after + 1

    @property
    def ever(self) -> int:
        """At least the time of any stage, and of all stages together."""
        return self.work[-1] * max(self.slowness)

    def weight_bytes(self, cut: Cut) -> int:
        """Resident weights of a stage."""
        _, start, end = cut
        held = self.weights[end] - self.weights[start] + self.everywhere
        for layers, size in self.tied:
            at = bisect_left(layers, start)
            if at < len(layers) and layers[at] < end:
                held += size
        return held

    def kv_block_bytes(self, cut: Cut) -> int:
        """One KV block in all layers of a stage."""
        return self.kv[cut.end] - self.kv[cut.start]

    def state_bytes(self, cut: Cut) -> int:
        """Recurrent state of all sequences in a stage."""
        return self.state[cut.end] - self.state[cut.start]

    def need(self, cut: Cut, blocks: int) -> int:
        """Every byte of a stage that holds `blocks` KV blocks. A longer run never needs less than a part of it."""
        held = self.reserves[cut.device].held(
            last=cut.end == self.layers, blocks=blocks, kv_block_bytes=self.kv_block_bytes(cut)
        )
        return self.weight_bytes(cut) + self.state_bytes(cut) + held

    def time(self, cut: Cut) -> int:
        """Multiply-adds of one token through a stage, over the device's speed."""
        return (self.work[cut.end] - self.work[cut.start]) * self.slowness[cut.device]

    def alone(self) -> Problem | None:
        """The same without its last resort, priced anew (a shorter pipeline has less on its way between stages); None
        where a pin insists on the last resort."""
        question = self.question
        devices = len(question.devices) - 1
        if any(pin is not None and pin % (devices + 1) == devices for pin in question.pins):
            return None
        return type(self).of(
            replace(question, devices=question.devices[:-1], budgets=question.budgets[:-1], last_resort=False)
        )

    def confined(self, layer: int) -> Problem:
        """The same with the layers from `layer` on for the last resort and those before for the others."""
        *others, last = self.fences
        before = tuple(tuple(max(start, min(end, layer)) for start, end in enumerate(fence)) for fence in others)
        behind = tuple(end if start >= layer else start for start, end in enumerate(last))
        return replace(self, fences=(*before, behind))


def _running(values: Iterable[int]) -> tuple[int, ...]:
    return tuple(accumulate(values, initial=0))


def _storages(footprint: Footprint) -> tuple[list[int], tuple[tuple[tuple[int, ...], int], ...], int]:
    """Bytes that belong to one layer each, those that several layers share, and those that every stage holds.

    What lives beside a layer counts as the layer's own.
    """
    layers = footprint.layers
    size: dict[str, int] = {}
    users: dict[str, set[int]] = defaultdict(set)
    lent = ((layer, module) for layer, modules in enumerate(footprint.lent) for module in modules)
    for layer, module in (*enumerate(layers), *footprint.beside, *lent):
        for tensor in module.tensors:
            size[tensor.storage] = tensor.bytes
            users[tensor.storage].add(layer)
    for module in footprint.with_role("shared"):
        for tensor in module.tensors:
            size[tensor.storage] = tensor.bytes
            users[tensor.storage] = set(range(len(layers)))
    sums: dict[tuple[int, ...], int] = defaultdict(int)
    for storage, used in users.items():
        sums[tuple(sorted(used))] += size[storage]
    if len(layers) == 1:
        return [sum(sums.values())], (), 0
    alone = [sums.pop((layer,), 0) for layer in range(len(layers))]
    everywhere = sums.pop(tuple(range(len(layers))), 0)
    return alone, tuple(sorted(sums.items())), everywhere


def _slowness(question: Question) -> tuple[int, ...]:
    gpus = question.devices[: len(question.devices) - question.last_resort]
    speeds = [gpu.speed // gcd(*(gpu.speed for gpu in gpus)) for gpu in gpus]
    unit = lcm(*speeds)
    slow = [unit // speed for speed in speeds]
    return (*slow, max(slow) * _LAST_RESORT_SLOWNESS) if question.last_resort else tuple(slow)


def _fence(question: Question, device: int) -> tuple[int, ...]:
    """Per start, the first layer from there on that is pinned to another device."""
    count, here = len(question.footprint.layers), len(question.devices)
    fence = [count] * (count + 1)
    for layer in reversed(range(len(question.pins))):
        pin = question.pins[layer]
        fence[layer] = fence[layer + 1] if pin is None or pin % here == device else layer
    return tuple(fence)


def _steps(question: Question, kinds: tuple[object, ...]) -> tuple[Step, ...]:
    """The choices that the question's order leaves. `kinds` are equal for devices that may stand for each other."""
    count = len(question.devices)
    if question.order == "given":
        return tuple(Step(device, device, device + 1) for device in range(count))
    free = count - question.last_resort
    members: dict[object, list[int]] = defaultdict(list)
    for device in range(free):
        members[kinds[device]].append(device)
    groups = list(members.values())
    sets = prod(len(group) + 1 for group in groups)
    weighed = sum(sets * len(group) // (len(group) + 1) for group in groups)
    if weighed > MOST_STEPS:
        raise PlacementError(
            f'order="best" would weigh {weighed:,} choices of a next device among {len(groups)} kinds, and weighs at '
            f'most {MOST_STEPS:,}; give order="given"'
        )
    passed = sorted(product(*(range(len(group) + 1) for group in groups)), key=sum)
    index = {used: i for i, used in enumerate(passed)}
    steps = [
        Step(index[(*used[:k], used[k] - 1, *used[k + 1 :])], group[used[k] - 1], i)
        for used, i in index.items()
        for k, group in enumerate(groups)
        if used[k]
    ]
    # Of equally good ways into a set, the one that takes the devices in the given order is met first.
    steps.sort(key=lambda step: (step.after, -step.device))
    if question.last_resort:
        steps.append(Step(len(passed) - 1, free, len(passed)))
    return tuple(steps)
