"""What one group of GPUs can do for one model: its plan and its estimated speed, solved once per kind of group.

GPUs that are alike make groups that are alike, on whatever node: a plan is kept by model, quantisation, context and
the number of GPUs of each kind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from operator import le

from placement.errors import PlacementError
from placement.footprint import Footprint
from placement.hardware import Gpu, Inventory, Node
from placement.packing import Counts
from placement.plan import Plan, answer
from placement.question import Question, ask
from placement.speed import Speed, estimate
from placement.wishes import Wish

Weigh = Callable[[Wish, str], Footprint]
"""A model at one of its quantisations, weighed."""

Kinds = tuple[bool, ...]
"""Which kinds of GPU are in a group."""

MOST_SHAPES = 16
"""Of a node, up to which every one of them is considered."""

_FREE_STEP = 256 * 2**20
"""Free bytes are rounded down to whole steps, so that GPUs of a kind that differ by a few pages count as alike."""


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """A replica of one model on the GPUs that a kind of group has. There is one object for each."""

    wish: Wish
    quantization: str
    counts: Counts
    """GPUs of each kind."""
    plan: Plan
    speed: Speed
    """At the wished context, with as many sequences as the replica holds."""


@dataclass(frozen=True, slots=True)
class Fleet:
    """An inventory as numbers: the kinds of GPU there are, and how many of each every node has."""

    nodes: tuple[Node, ...]
    kinds: tuple[Gpu, ...]

    @classmethod
    def of(cls, inventory: Inventory) -> Fleet:
        """Sort out the kinds.

        Raises:
            PlacementError: no GPU, or a device that is not one.
        """
        for node in inventory.nodes:
            if any(gpu.device_type != "cuda" for gpu in node.gpus):
                raise PlacementError(f"node {node.name} has CPU devices; a cluster is planned on GPUs, leave them out")
        if not inventory.gpus:
            raise PlacementError("the inventory has no GPU; a cluster is planned on GPUs")
        return cls(inventory.nodes, tuple(dict.fromkeys(map(_kind, inventory.gpus))))

    def counts(self, node: Node) -> Counts:
        """GPUs of each kind that `node` has."""
        return tuple(map(len, self.indices(node)))

    def indices(self, node: Node) -> list[list[int]]:
        """The indices of `node`'s GPUs, by kind."""
        held = [_kind(gpu) for gpu in node.gpus]
        return [[i for i, gpu in enumerate(held) if gpu == kind] for kind in self.kinds]

    def gpus(self, counts: Counts) -> tuple[Gpu, ...]:
        """The GPUs of a group, in pipeline order."""
        return tuple(kind for kind, count in zip(self.kinds, counts, strict=True) for _ in range(count))

    def shapes(self) -> list[Counts]:
        """Every group that some node has the GPUs for."""
        return sorted({shape for node in {*map(self.counts, self.nodes)} for shape in within(node)})


def within(node: Counts) -> list[Counts]:
    """Every group that a node has the GPUs for, smaller ones first."""
    shapes = product(*(range(count + 1) for count in node))
    return sorted((shape for shape in shapes if any(shape)), key=lambda shape: (sum(shape), shape))


def _kind(gpu: Gpu) -> Gpu:
    if gpu.free_bytes is None:
        return gpu
    return replace(gpu, free_bytes=gpu.free_bytes // _FREE_STEP * _FREE_STEP)


@dataclass(slots=True)
class Groups:
    """Every group that could be formed, each solved when it is first asked for."""

    fleet: Fleet
    weigh: Weigh
    _footprints: dict[tuple[str, str], Footprint] = field(default_factory=dict)
    _groups: dict[tuple[str, str, Counts, int], Group | None] = field(default_factory=dict)

    def footprint(self, wish: Wish, quantization: str) -> Footprint:
        """The model at one quantisation."""
        key = (wish.name, quantization)
        if key not in self._footprints:
            self._footprints[key] = self.weigh(wish, quantization)
        return self._footprints[key]

    def longest(self, wish: Wish) -> int:
        """Tokens of the longest sequence that the model was made for."""
        return self.footprint(wish, wish.quantization[0]).geometry.max_context

    def context(self, wish: Wish, stretch: int = 1) -> int:
        """The wished context times `stretch`, as far as the model goes."""
        wished = wish.context or self.longest(wish)
        return wished if stretch == 1 else min(stretch * wished, self.longest(wish))

    def of_node(self, wish: Wish, allowed: Sequence[str], context: int, node: Counts) -> list[Group]:
        """The groups of a node that can serve sequences of `context` tokens.

        A group's quantisation depends on the kinds of GPU in it: it is the first one of `allowed` that any group of
        such kinds on this node can hold. So an 80 GB GPU may have int8 beside nf4 on one of 24 GB, but where two of 24
        GB hold int8, none of them serves alone with nf4. On a node with more than `MOST_SHAPES` possible groups, those
        that mix kinds are left out where some of these kinds can do without the others.
        """
        by_kinds: dict[Kinds, list[Counts]] = {}
        for shape in within(node):
            by_kinds.setdefault(tuple(map(bool, shape)), []).append(shape)
        many = sum(map(len, by_kinds.values())) > MOST_SHAPES
        found: list[Group] = []
        first: dict[Kinds, int] = {}
        for kinds, shapes in by_kinds.items():  # a part of the kinds comes before all of them
            parts = [level for part, level in first.items() if all(map(le, part, kinds))]
            if many and parts:
                first[kinds] = min(parts)
                continue
            for level, quantization in enumerate(allowed[: min(parts, default=len(allowed)) + 1]):
                here = [group for shape in shapes if (group := self.one(wish, quantization, shape, context))]
                if here or level in parts:
                    first[kinds] = level
                    found += here
                    break
        return found

    def one(self, wish: Wish, quantization: str, counts: Counts, context: int) -> Group | None:
        """One group; None where it can't hold a sequence of `context` tokens, or would leave a GPU empty."""
        key = (wish.name, quantization, counts, context)
        if key not in self._groups:
            self._groups[key] = self._solve(wish, quantization, counts, context)
        return self._groups[key]

    def _solve(self, wish: Wish, quantization: str, counts: Counts, context: int) -> Group | None:
        weighed, gpus = self.footprint(wish, quantization), self.fleet.gpus(counts)
        if weighed.bytes > sum(gpu.usable_bytes for gpu in gpus):
            return None
        plan = answer(self.question(wish, quantization, counts, context), wish.goal)
        if plan is None or len(plan.stages) < len(gpus):
            return None
        wished = self.context(wish)
        sequences = max(1, min(wish.max_sequences, plan.capacity_tokens // wished))
        speed = estimate(weighed, plan, context=wished, sequences=sequences, chunk=wish.max_batch_tokens)
        return Group(wish, quantization, counts, plan, speed)

    def question(self, wish: Wish, quantization: str, counts: Counts, context: int) -> Question:
        """What the solver is asked for one group.

        Raises:
            PlacementError: a wish that makes no sense.
        """
        return ask(
            self.footprint(wish, quantization),
            self.fleet.gpus(counts),
            block_size=wish.block_size,
            max_batch_tokens=wish.max_batch_tokens,
            max_sequences=wish.max_sequences,
            max_context=context,
            min_context=context,
        )
