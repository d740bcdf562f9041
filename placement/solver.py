"""The exact split of decoder layers over ordered devices.

One question is asked again and again: can the layers be split so that no stage takes longer than `time` and each has
room for `blocks` KV blocks? Giving every device, in order, as many layers as it can take answers it exactly: a run of
layers never costs less than a part of it, so a longer prefix behind is never worse. The least time and the most blocks
are then found by bisection, in whole numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate
from math import lcm
from typing import Literal

from placement.footprint import Footprint, resident_bytes
from placement.hardware import Gpu
from placement.kv import dtype_bytes
from placement.reserve import Reserve, Workload, reserve

Goal = Literal["throughput", "capacity", "latency"]

_SLACK_PERCENT = 5
"""How much slower than the best possible the slowest stage may be, under goal="throughput", for more KV blocks."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Layers [start, end) on one device."""

    device: int
    start: int
    end: int


Cuts = tuple[Cut, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """A model, a workload and budgets, with running sums so that any run of layers is priced in a few additions."""

    footprint: Footprint
    devices: tuple[Gpu, ...]
    budgets: tuple[int, ...]
    """Bytes per device, the CUDA context included."""
    workload: Workload
    reserves: tuple[Reserve, ...]
    weights: tuple[int, ...]
    """Bytes of the layers before the i-th; so are `kv` (bytes of one block) and `work` (multiply-adds)."""
    kv: tuple[int, ...]
    work: tuple[int, ...]
    first_bytes: int
    last_bytes: int
    tied_bytes: int
    """What the first and the last modules share when they are on one device."""
    shared_bytes: int
    last_work: int
    slowness: tuple[int, ...]
    """Time of one multiply-add per device, in the smallest unit that keeps all of them whole."""

    @classmethod
    def of(
        cls, footprint: Footprint, devices: tuple[Gpu, ...], budgets: tuple[int, ...], workload: Workload
    ) -> Problem:
        """Sum up `footprint`."""
        layers = footprint.layers
        per_token = dtype_bytes(workload.kv_dtype) * workload.block_size
        first, last, shared = (footprint.with_role(role) for role in ("first", "last", "shared"))
        unit = lcm(*(gpu.speed for gpu in devices))
        return cls(
            footprint=footprint,
            devices=devices,
            budgets=budgets,
            workload=workload,
            reserves=tuple(
                reserve(footprint, workload, device_type=gpu.device_type, budget_bytes=budget)
                for gpu, budget in zip(devices, budgets, strict=True)
            ),
            weights=_running(module.bytes for module in layers),
            kv=_running(kv.elements_per_token * per_token for kv in footprint.geometry.kv),
            work=_running(module.work for module in layers),
            first_bytes=resident_bytes(first),
            last_bytes=resident_bytes(last),
            tied_bytes=resident_bytes(first) + resident_bytes(last) - resident_bytes(first + last),
            shared_bytes=resident_bytes(shared),
            last_work=sum(module.work for module in last),
            slowness=tuple(unit // gpu.speed for gpu in devices),
        )

    @property
    def layers(self) -> int:
        """How many decoder layers there are."""
        return len(self.work) - 1

    @property
    def ever(self) -> int:
        """At least the time of any stage."""
        return (self.work[-1] + self.last_work) * max(self.slowness)

    def weight_bytes(self, cut: Cut) -> int:
        """Resident weights of a stage."""
        first, last = cut.start == 0, cut.end == self.layers
        ends = first * self.first_bytes + last * self.last_bytes - (first and last) * self.tied_bytes
        return self.weights[cut.end] - self.weights[cut.start] + ends + self.shared_bytes

    def kv_block_bytes(self, cut: Cut) -> int:
        """One KV block in all layers of a stage."""
        return self.kv[cut.end] - self.kv[cut.start]

    def need(self, cut: Cut, blocks: int) -> int:
        """Every byte of a stage that holds `blocks` KV blocks."""
        held = self.reserves[cut.device].held(
            last=cut.end == self.layers, blocks=blocks, kv_block_bytes=self.kv_block_bytes(cut)
        )
        return self.weight_bytes(cut) + held

    def time(self, cut: Cut) -> int:
        """Multiply-adds of one token through a stage, over the device's speed."""
        work = self.work[cut.end] - self.work[cut.start] + (cut.end == self.layers) * self.last_work
        return work * self.slowness[cut.device]

    def pack(self, blocks: int, time: int) -> Cuts | None:
        """Stages that each hold `blocks` blocks and take at most `time`, or None when there is no such split."""
        cuts, done = [], 0
        for device in range(len(self.devices)):
            end = self._farthest(device, done, blocks, time)
            if end > done:
                cuts.append(Cut(device, done, end))
                done = end
            if done == self.layers:
                return tuple(cuts)
        return None

    def best(self, goal: Goal) -> tuple[Cuts, int] | None:
        """The best split and its KV blocks; None when not even one block fits."""
        ever = self.ever
        if self.pack(1, ever) is None:
            return None
        if goal == "latency":
            return self._best_latency()

        def most_blocks(time: int) -> int:
            return _last(lambda n: self.pack(n, time) is not None, 1, self.workload.most_blocks)

        def least_time(blocks: int) -> int:
            return ever - _last(lambda saved: self.pack(blocks, ever - saved) is not None, 0, ever)

        blocks = most_blocks(ever if goal == "capacity" else least_time(1) * (100 + _SLACK_PERCENT) // 100)
        cuts = self.pack(blocks, least_time(blocks))
        assert cuts is not None, "bisection ends on a split that exists"
        return cuts, blocks

    def _farthest(self, device: int, start: int, blocks: int, time: int) -> int:
        """The farthest end of a stage from `start`; `start` itself when not one layer can be taken."""

        def can(end: int) -> bool:
            cut = Cut(device, start, end)
            return end == start or (self.time(cut) <= time and self.need(cut, blocks) <= self.budgets[device])

        return _last(can, start, self.layers)

    def _best_latency(self) -> tuple[Cuts, int]:
        """Time through all stages is a sum, so here every cut is tried: O(devices * layers^2) per number of blocks."""
        quickest = self._quickest(1)
        assert quickest is not None, "asked only where a split exists"
        target = quickest[:2]

        def as_quick(blocks: int) -> bool:
            found = self._quickest(blocks)
            return found is not None and found[:2] == target

        blocks = _last(as_quick, 1, self.workload.most_blocks)
        found = self._quickest(blocks)
        assert found is not None, "bisection ends on a split that exists"
        return found[2], blocks

    def _quickest(self, blocks: int) -> tuple[int, int, Cuts] | None:
        """(time, stages, cuts), least in that order, with room for `blocks` everywhere."""
        reached: dict[int, tuple[int, int, Cuts]] = {0: (0, 0, ())}
        for device in range(len(self.devices)):
            # A snapshot: a device takes one stage at most, so its own results must not be built upon.
            for start, (time, stages, cuts) in sorted(reached.items()):
                for end in range(start + 1, self._farthest(device, start, blocks, self.ever) + 1):
                    cut = Cut(device, start, end)
                    option = (time + self.time(cut), stages + 1, (*cuts, cut))
                    if end not in reached or option[:2] < reached[end][:2]:
                        reached[end] = option
        return reached.get(self.layers)


def _running(values: Iterable[int]) -> tuple[int, ...]:
    return tuple(accumulate(values, initial=0))


def _last(true: Callable[[int], bool], low: int, high: int) -> int:
    """The last number in [low, high] for which a predicate holds that is true at `low` and never turns true again."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if true(middle) else (low, middle - 1)
    return low
