"""Which groups of GPUs to form on every node, so that all models together are served best.

Everything here is counting: a node is a number of GPUs per kind, an item is a group of GPUs that serves one model and
is worth so much to it. What a packing amounts to is a `State`, sums per model. A state is surely better than another
only where it is so for every model, so whole sets of states are kept: for a node by dynamic programming over the GPUs
it has left, for the cluster by adding up the sets of its nodes, those that are alike by doubling. Of more than `limit`
states those that rank first are kept. Below that the answer is exact, above it is good; it is the same every time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import product
from operator import add, le, sub
from typing import TypeVar

Counts = tuple[int, ...]
"""GPUs of each kind."""
State = tuple[int, ...]
"""Per model the sequences it can hold, never above those wished for; then per model the worth of its groups."""
Groups = tuple[int, ...]
"""The groups of one node, as indices of items, in rising order."""

TIDY_PERCENT = 3
"""Of a model's worth, that fewer kinds of group may cost."""

_SCALE = 10**6
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Item:
    """A group of GPUs that serves one model."""

    model: int
    needs: Counts
    sequences: int
    """That it holds at once."""
    worth: int
    """To its model, in the unit that the models are compared in."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What one model asks for."""

    sequences: int
    """At once, in all its groups together."""
    share: int
    """Models are balanced on worth / share."""


@dataclass(frozen=True, slots=True)
class Packing:
    """The best packing found."""

    nodes: tuple[Groups, ...]
    """In the order of the nodes given."""
    state: State
    exact: bool
    """It is certain that none ranks higher."""


def pack(
    nodes: Sequence[Counts],
    items: Sequence[Item],
    demands: Sequence[Demand],
    offers: Mapping[Counts, Sequence[int]],
    *,
    limit: int,
) -> Packing:
    """The packing that ranks first: the model furthest below its wished sequences has the most of them, then the
    model with the least worth / share has the most of it, then the next; then the fewest GPUs.

    Args:
        nodes: the GPUs of each node, per kind.
        items: what can be formed of them.
        demands: of each model, at least one.
        offers: which items may be formed on a node with these GPUs, by index; each within them.
        limit: most states kept of one set.
    """
    packer = _Packer(items, demands, offers, limit)
    alike = Counter(nodes)
    # Nodes that few models can use first: what they give is known before the others have to be divided.
    order = sorted(alike, key=lambda counts: (packer.models_of(counts), counts))
    sets = (packer.of_nodes(packer.of_node(counts), alike[counts]) for counts in order)
    none: dict[State, tuple[Groups, ...]] = {packer.nothing: ()}
    states = reduce(packer.add, sets, none)
    state = max(states, key=packer.rank)
    waiting = iter(states[state])
    groups = {counts: [tuple(sorted(next(waiting))) for _ in range(alike[counts])] for counts in order}
    return Packing(tuple(groups[counts].pop(0) for counts in nodes), state, packer.exact)


def tidy(
    packing: Packing,
    nodes: Sequence[Counts],
    items: Sequence[Item],
    demands: Sequence[Demand],
    offers: Mapping[Counts, Sequence[int]],
    *,
    limit: int,
) -> Packing:
    """`packing` with fewer kinds of group, where that costs no model a sequence that it asks for and none more than
    `TIDY_PERCENT` of its worth. The arguments are those of `pack`; `exact` stays what it was.

    What few GPUs are used for is left out first. A kind that can't be spared is not tried again: with fewer others
    beside it, it can be spared even less.
    """
    models = len(demands)
    least = (*packing.state[:models], *(-(-worth * (100 - TIDY_PERCENT) // 100) for worth in packing.state[models:]))
    used = Counter(i for groups in packing.nodes for i in groups)
    for spared in sorted(used, key=lambda i: (used[i] * sum(items[i].needs), i)):
        kept = {i for groups in packing.nodes for i in groups} - {spared}
        narrowed = {node: [i for i in offers[node] if i in kept] for node in offers}
        found = pack(nodes, items, demands, narrowed, limit=limit)
        if _within(least, found.state):
            packing = replace(found, exact=packing.exact)
    return packing


@dataclass(slots=True)
class _Packer:
    items: Sequence[Item]
    demands: Sequence[Demand]
    offers: Mapping[Counts, Sequence[int]]
    limit: int
    nothing: State = field(init=False)
    exact: bool = True
    _wished: tuple[int, ...] = field(init=False)
    _ranks: dict[State, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.nothing = (0,) * (2 * len(self.demands))
        self._wished = tuple(demand.sequences for demand in self.demands)

    def models_of(self, counts: Counts) -> int:
        """How many models a node has room for."""
        return len({self.items[i].model for i in self.offers[counts]})

    def of_node(self, counts: Counts) -> dict[State, tuple[Groups, ...]]:
        """The states that one node can have, each with its groups."""
        offered = [(i, self.items[i].needs, self._state(self.items[i])) for i in self.offers[counts]]
        best: dict[Counts, dict[State, Groups]] = {}
        for left in product(*(range(count + 1) for count in counts)):  # a smaller vector comes before a larger one
            found: dict[State, Groups] = {self.nothing: ()}
            # Fewer GPUs come first, so that of two packings with one state the smaller is kept.
            for kind, count in enumerate(left):
                _merge(found, best[_minus_one(left, kind)].items() if count else ())
            for i, needs, gain in offered:
                if _within(needs, left):
                    before = best[tuple(map(sub, left, needs))]
                    _merge(found, ((self._sum(state, gain), (*groups, i)) for state, groups in before.items()))
            best[left] = self._best(found)
        return {state: (groups,) for state, groups in best[counts].items()}

    def of_nodes(self, one: dict[State, tuple[Groups, ...]], count: int) -> dict[State, tuple[Groups, ...]]:
        """The states of `count` nodes that are alike."""
        if count == 1:
            return one
        half = self.of_nodes(one, count // 2)
        both = self.add(half, half)
        return self.add(both, one) if count % 2 else both

    def add(
        self, left: dict[State, tuple[Groups, ...]], right: dict[State, tuple[Groups, ...]]
    ) -> dict[State, tuple[Groups, ...]]:
        """The states of two sets of nodes together."""
        pairs: dict[State, tuple[State, State]] = {}
        _merge(pairs, ((self._sum(a, b), (a, b)) for a in left for b in right))
        return {state: left[a] + right[b] for state, (a, b) in self._best(pairs).items()}

    def rank(self, state: State) -> tuple[int, ...]:
        """Larger is better, and never smaller for a state that is nowhere below another."""
        if (known := self._ranks.get(state)) is not None:
            return known
        models = len(self.demands)
        held = [state[m] * _SCALE // demand.sequences for m, demand in enumerate(self.demands)]
        served = [state[models + m] * _SCALE // demand.share for m, demand in enumerate(self.demands)]
        self._ranks[state] = rank = (*sorted(held), *sorted(served))
        return rank

    def _state(self, item: Item) -> State:
        models, state = len(self.demands), list(self.nothing)
        state[item.model], state[models + item.model] = item.sequences, item.worth
        return self._sum(tuple(state), self.nothing)

    def _sum(self, a: State, b: State) -> State:
        total = map(add, a, b)
        # `map` stops when there are no more wished sequences, before it takes a worth out of `total`.
        return (*map(min, self._wished, total), *total)

    def _best(self, found: dict[State, _T]) -> dict[State, _T]:
        """The states that none surpasses, at most `limit` of them, those that rank first."""
        kept: dict[State, _T] = {}
        for state in sorted(found, key=lambda state: (self.rank(state), state), reverse=True):
            if any(_within(state, other) for other in kept):
                continue
            if len(kept) == self.limit:
                self.exact = False
                break
            kept[state] = found[state]
        return kept


def _within(small: tuple[int, ...], large: tuple[int, ...]) -> bool:
    return all(map(le, small, large))


def _minus_one(counts: Counts, kind: int) -> Counts:
    return (*counts[:kind], counts[kind] - 1, *counts[kind + 1 :])


def _merge(into: dict[State, _T], found: Iterable[tuple[State, _T]]) -> None:
    for state, what in found:
        into.setdefault(state, what)
