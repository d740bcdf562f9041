"""A whole cluster: which GPUs form a replica of which model, at which quantisation, on which node.

A replica's GPUs are of one node, as one process owns them. The question is how to cut every node's GPUs into groups (4
GPUs: four of 1, two of 2, one of 4?), and it is answered by `placement.packing` from what each kind of group can do
(`placement.groups`). Beside the layout that the wishes ask for stand those that one could have instead: longer
sequences, other goals, other quantisations. Together they are the frontier: none of its rows is better in everything
than another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from placement.cards import find_card
from placement.errors import PlacementError
from placement.groups import Fleet, Group, Groups, Weigh
from placement.hardware import Gpu, Inventory
from placement.packing import Counts, Demand, Item, Packing, pack, tidy
from placement.plan import Plan
from placement.problem import Problem
from placement.shortfall import shortfall
from placement.solver import Goal
from placement.speed import Speed
from placement.wishes import Wish, check_together

Aim = Literal["as wished", "throughput", "capacity", "latency"]

Offers = dict[Counts, list[list[Group]]]
"""For every kind of node, per model, the groups that it could form."""

_STRETCH = 4
"""Beside the wished context the frontier shows this many times as much, and the models' longest."""
_LIMIT, _LIMIT_OF_MANY, _BESIDE_LIMIT = 256, 64, 16
"""States that a packing keeps: the one asked for, for up to two models and for more, and the frontier's others."""
_NEARLY_PERCENT = 5
"""A row of the frontier that is nowhere better than another one by more than this is left out."""
_QUICK_PERCENT = 105
"""goal="latency" takes groups that need at most this much of the quickest group's time per token."""


@dataclass(frozen=True, slots=True)
class Host:
    """Where one replica runs."""

    node: str
    devices: tuple[int, ...]
    """Indices into the node's GPUs, in pipeline order."""


@dataclass(frozen=True, slots=True)
class Pool:
    """Replicas of one model that are alike."""

    wish: Wish
    quantization: str
    gpus: tuple[Gpu, ...]
    """Of one replica, in pipeline order."""
    plan: Plan
    """Of each replica."""
    speed: Speed
    """Of each replica, estimated."""
    hosts: tuple[Host, ...]

    @property
    def replicas(self) -> int:
        """How many there are."""
        return len(self.hosts)


@dataclass(frozen=True, slots=True)
class Layout:
    """One way to use the cluster: a row of the frontier."""

    aim: Aim
    """What it is the best for, under its contexts and quantisations."""
    pools: tuple[Pool, ...]
    """By model in the order wished, then by quantisation, kinds of GPU and size."""
    idle: tuple[Host, ...]
    """Per node the GPUs that nothing runs on."""
    exact: bool
    """It is certain that none is better under its aim, but for the few per cent that `placement.packing.tidy` may give
    up for fewer pools; else it is the best of a wide search."""
    contexts: tuple[int, ...]
    """Per model, in the order wished: tokens that a sequence may have on every replica."""
    steps: int
    """How far down the wishes' lists of quantisations it went, all models together."""

    @property
    def decode(self) -> int:
        """Estimated tokens/s of all models together, while traffic comes in the wished shares."""
        wishes = {pool.wish.name: pool.wish for pool in self.pools}
        each = {name: sum(p.replicas * p.speed.decode for p in self.pools if p.wish.name == name) for name in wishes}
        return min(each[name] * sum(w.share for w in wishes.values()) // wishes[name].share for name in wishes)

    @property
    def single(self) -> int:
        """Estimated tokens/s of a lone sequence, on the slowest replica."""
        return min(pool.speed.single for pool in self.pools)

    @property
    def kv_tokens(self) -> int:
        """KV capacity of all replicas."""
        return sum(pool.replicas * pool.plan.capacity_tokens for pool in self.pools)

    @property
    def merits(self) -> tuple[int, ...]:
        """What rows are compared by; larger is better in each."""
        quick = (self.single,) if any(pool.wish.goal == "latency" for pool in self.pools) else ()
        return -self.steps, self.decode, self.kv_tokens, *self.contexts, *quick


@dataclass(frozen=True, slots=True)
class ClusterPlan:
    """The layout that the wishes ask for, and the frontier that it is on."""

    inventory: Inventory
    chosen: Layout
    frontier: tuple[Layout, ...]
    """By quantisation, then context, then speed; `chosen` is one of them."""


def plan_cluster(inventory: Inventory, wishes: Sequence[Wish], weigh: Weigh) -> ClusterPlan:
    """The best layout of `wishes` on `inventory`.

    Every model gets the sequences that its wish asks for, by the best quantisations that suffice; then the model that
    is served worst for its share gets as much as it can, then the next one.

    Args:
        inventory: nodes with GPUs.
        wishes: the models.
        weigh: gives a model's footprint at one of its quantisations; asked once for each.

    Raises:
        PlacementError: a model fits no node, or they don't all get what they ask for at once; the message says what is
            short and which wishes to change.
    """
    check_together(tuple(wishes))
    search = _Search(Groups(Fleet.of(inventory), weigh), tuple(wishes))
    wanted, levels = search.first()
    rows = [wanted, *search.others(levels)]
    better = [replace(row, aim=wanted.aim) for row in rows if row.steps == wanted.steps and _surpasses(row, wanted)]
    chosen = max(better, key=lambda row: row.merits, default=wanted)
    return ClusterPlan(inventory, chosen, _frontier(chosen, rows))


def _frontier(chosen: Layout, rows: list[Layout]) -> tuple[Layout, ...]:
    """`chosen`, and the rows that are better than each of the others in something that matters."""
    front = [chosen]
    for row in sorted(rows, key=lambda row: row.merits, reverse=True):
        if not any(_surpasses(other, row) for other in rows) and not any(_nearly(row, other) for other in front):
            front = [other for other in front if other is chosen or not _nearly(other, row)] + [row]
    return tuple(sorted(front, key=lambda row: (row.steps, row.contexts, -row.decode, -row.kv_tokens)))


def _nearly(row: Layout, other: Layout) -> bool:
    """Whether `row` is no better than `other` in anything, but for a few per cent."""
    pairs = zip(row.merits[1:], other.merits[1:], strict=True)
    return row.steps >= other.steps and all(a * 100 <= b * (100 + _NEARLY_PERCENT) for a, b in pairs)


def _surpasses(row: Layout, other: Layout) -> bool:
    return row.merits != other.merits and all(a >= b for a, b in zip(row.merits, other.merits, strict=True))


@dataclass(slots=True)
class _Search:
    groups: Groups
    wishes: tuple[Wish, ...]

    @property
    def aim(self) -> Aim:
        """What the wishes ask for, by its name where they agree."""
        goals = {wish.goal for wish in self.wishes}
        return goals.pop() if len(goals) == 1 else "as wished"

    def first(self) -> tuple[Layout, tuple[int, ...]]:
        """The layout that the wishes ask for, and how far down its list of quantisations each model had to go."""
        limit = _LIMIT if len(self.wishes) <= 2 else _LIMIT_OF_MANY
        levels = (0,) * len(self.wishes)
        while True:
            layout, short = self.layout(levels, 1, self.aim, limit)
            if not short:
                return layout, levels
            # Of the models that are short of sequences, the worst off that has a lesser quantisation takes it.
            able = [m for m in short if levels[m] + 1 < len(self.wishes[m].quantization)]
            if not able:
                raise _too_much(self.groups, self.wishes[short[0]], layout)
            levels = tuple(level + (m == able[0]) for m, level in enumerate(levels))

    def others(self, levels: tuple[int, ...]) -> Iterator[Layout]:
        """Every layout that holds the wished sequences, under lesser quantisations, longer contexts and other goals."""
        quick = any(wish.goal == "latency" for wish in self.wishes)
        aims = (self.aim, *(goal for goal in get_args(Goal) if goal != self.aim and (quick or goal != "latency")))
        for lower in self._lower(levels):
            for stretch in self._stretches():
                for aim in aims:
                    layout, short = self.layout(lower, stretch, aim)
                    if not short:
                        yield layout

    def _lower(self, levels: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        """`levels`, then all of them one further down, as far as the lists go."""
        yield levels
        last = tuple(len(wish.quantization) - 1 for wish in self.wishes)
        while levels != last:
            levels = tuple(min(level + 1, most) for level, most in zip(levels, last, strict=True))
            yield levels

    def _stretches(self) -> list[int]:
        """Multiples of the wished contexts that make a difference."""
        longest = max(-(-self.groups.longest(wish) // self.groups.context(wish)) for wish in self.wishes)
        return sorted({1, min(_STRETCH, longest), longest})

    def _contexts(self, stretch: int) -> tuple[int, ...]:
        return tuple(self.groups.context(wish, stretch) for wish in self.wishes)

    def layout(
        self, levels: tuple[int, ...], stretch: int, aim: Aim, limit: int = _BESIDE_LIMIT
    ) -> tuple[Layout, list[int]]:
        """The best layout under an aim, and the models that it gives too few sequences, the worst off first."""
        contexts = self._contexts(stretch)
        goals = [_goal(wish, aim) for wish in self.wishes]
        offers = {
            node: [
                self.groups.of_node(wish, wish.quantization[level:], context, node)
                for wish, level, context in zip(self.wishes, levels, contexts, strict=True)
            ]
            for node in dict.fromkeys(self._nodes)
        }
        packing, groups = self._pack(_quick(offers, goals), goals, limit)
        if "latency" in goals and self._short(packing.state):
            packing, groups = self._pack(offers, goals, limit)
        pools, idle = _place(self.groups.fleet, groups, packing)
        return Layout(aim, pools, idle, packing.exact, contexts, sum(levels)), self._short(packing.state)

    def _pack(self, offers: Offers, goals: list[Goal], limit: int) -> tuple[Packing, list[Group]]:
        """The best packing, and the groups that it speaks of by index."""
        found = dict.fromkeys(group for of_models in offers.values() for each in of_models for group in each)
        groups = sorted(found, key=self._place_in_order)
        index = {group: i for i, group in enumerate(groups)}
        model = {wish.name: m for m, wish in enumerate(self.wishes)}
        items = [Item(m := model[g.wish.name], g.counts, g.speed.sequences, _worth(g, goals[m])) for g in groups]
        allowed = {node: [index[g] for each in of_models for g in each] for node, of_models in offers.items()}
        demands = [Demand(wish.concurrency, wish.share) for wish in self.wishes]
        packing = pack(self._nodes, items, demands, allowed, limit=limit)
        return tidy(packing, self._nodes, items, demands, allowed, limit=_BESIDE_LIMIT), groups

    def _place_in_order(self, group: Group) -> tuple[int, int, Counts]:
        backwards = tuple(-count for count in group.counts)
        return self.wishes.index(group.wish), group.wish.quantization.index(group.quantization), backwards

    @property
    def _nodes(self) -> list[Counts]:
        return [self.groups.fleet.counts(node) for node in self.groups.fleet.nodes]

    def _short(self, held: Sequence[int]) -> list[int]:
        """The models with fewer sequences than wished, the worst off first."""
        parts = {m: held[m] * 10**6 // wish.concurrency for m, wish in enumerate(self.wishes)}
        return sorted((m for m, wish in enumerate(self.wishes) if held[m] < wish.concurrency), key=parts.__getitem__)


def _goal(wish: Wish, aim: Aim) -> Goal:
    return wish.goal if aim == "as wished" else aim


def _quick(offers: Offers, goals: list[Goal]) -> Offers:
    """Only the quickest groups of each model whose goal is latency."""
    least = [0] * len(goals)
    for m, goal in enumerate(goals):
        if goal == "latency":
            least[m] = max((g.speed.single for each in offers.values() for g in each[m]), default=0) * 100
    return {
        node: [[g for g in each[m] if g.speed.single * _QUICK_PERCENT >= least[m]] for m in range(len(goals))]
        for node, each in offers.items()
    }


def _worth(group: Group, goal: Goal) -> int:
    return group.plan.capacity_tokens if goal == "capacity" else group.speed.decode


def _place(fleet: Fleet, groups: list[Group], packing: Packing) -> tuple[tuple[Pool, ...], tuple[Host, ...]]:
    """Every group of a packing on GPUs of its node, and the GPUs that are left."""
    hosts: dict[int, list[Host]] = {}
    idle = []
    for node, chosen in zip(fleet.nodes, packing.nodes, strict=True):
        free = fleet.indices(node)
        for index in sorted(chosen):
            counts = groups[index].counts
            devices = tuple(free[kind].pop(0) for kind, count in enumerate(counts) for _ in range(count))
            hosts.setdefault(index, []).append(Host(node.name, devices))
        if left := tuple(sorted(device for devices in free for device in devices)):
            idle.append(Host(node.name, left))
    pools = tuple(_pool(fleet, groups[index], tuple(hosts[index])) for index in sorted(hosts))
    return pools, tuple(idle)


def _pool(fleet: Fleet, group: Group, hosts: tuple[Host, ...]) -> Pool:
    return Pool(group.wish, group.quantization, fleet.gpus(group.counts), group.plan, group.speed, hosts)


def _too_much(groups: Groups, wish: Wish, layout: Layout) -> PlacementError:
    """Why a model does not get what it wishes for, under the last of its quantisations."""
    context, quantization = groups.context(wish), wish.quantization[-1]
    shapes = groups.fleet.shapes()
    if any(groups.one(wish, quantization, shape, context) for shape in shapes):
        held = sum(pool.replicas * pool.speed.sequences for pool in layout.pools if pool.wish == wish)
        beside = " beside the other models" if len(layout.contexts) > 1 else ""
        fewer = "" if quantization in ("nf4", "fp4") else ", allow nf4 in quantization"
        return PlacementError(
            f"{wish.name}: {wish.concurrency} sequences of {context:,} tokens are wished for, the cluster holds "
            f"{held}{beside}; lower concurrency or context{fewer}, or add GPUs"
        )
    roomiest = max(shapes, key=lambda shape: sum(gpu.usable_bytes for gpu in groups.fleet.gpus(shape)))
    question = groups.question(wish, quantization, roomiest, context)
    where = f"{wish.name} fits no node; with {quantization} on the roomiest, {group_name(groups.fleet.gpus(roomiest))}"
    return PlacementError(f"{where}: {shortfall(Problem.of(question))}")


def group_name(gpus: Sequence[Gpu]) -> str:
    """A group as people write it: `2xH200`, `1xA100 80GB+1xL4`."""
    cards = ((gpu, find_card(gpu.name, gpu.memory_bytes)) for gpu in gpus)
    counted = Counter(card.name if card else gpu.name for gpu, card in cards)
    return "+".join(f"{count}x{name}" for name, count in counted.items())
