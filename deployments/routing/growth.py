"""What pools could hold, also those without a replica; what waits for those that scale, when to start one. Pure.

What waits counts for one pool alone, or all would grow for the same requests: the first in the order of the settings
that may get another replica and would hold it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from deployments.protocol import ReplicaState


@dataclass(frozen=True, slots=True)
class ScaledPool:
    """A pool with as many replicas as demand asks for."""

    name: str
    min_replicas: int
    max_replicas: int
    upscale_delay_s: float
    """How long it must be wanted before it gets its first replica, where others could serve instead."""


@dataclass(frozen=True, slots=True)
class Shape:
    """An empty replica."""

    block_size: int
    """Tokens."""
    capacity_blocks: int
    max_context: int
    """Tokens of prompt and output."""

    @property
    def headroom_blocks(self) -> int:
        """All of it."""
        return self.capacity_blocks

    @property
    def longest_tokens(self) -> int:
        """The longest request that it could hold to its last token."""
        return min(self.max_context, self.capacity_blocks * self.block_size)


class Waiting(NamedTuple):
    """Requests that wait and are alike."""

    pool: str | None
    """The pool that they insist on."""
    longest_tokens: int
    """At least as many as prompt and `max_tokens` of each of them."""
    tokens: int
    """Sum of their grants."""


class Replicas(Protocol):
    """What is asked of the fleet."""

    def alive(self, pool: str | None) -> int:
        """How many known replicas are alive."""

    def sold(self, pool: str | None) -> int:
        """To how many requests may be sent."""

    def longest_tokens(self, pool: str | None) -> int:
        """The longest request that a known replica could hold."""


class Growth:
    """What one ledger knows of its model's pools.

    Args:
        pools: those that scale, in the order of the settings.
        names: of all pools.
    """

    def __init__(self, pools: Sequence[ScaledPool], names: Iterable[str] = ()) -> None:
        self._pools = {pool.name: pool for pool in pools}
        self._all = tuple(names)
        self._shapes: dict[str, Shape] = {}
        """By pool, of the last replica that it had."""
        self._wanted_since: dict[str, float] = {}

    @property
    def from_none(self) -> bool:
        """Whether a pool may have no replica, and gets one when a request comes."""
        return any(pool.min_replicas == 0 for pool in self._pools.values())

    def learn(self, state: ReplicaState) -> None:
        """A replica is there."""
        self._shapes[state.pool] = Shape(state.block_size, state.capacity_blocks, state.max_context)

    def shapes(self, pool: str | None) -> list[Shape]:
        """Of the last replica of each pool, also of those that don't scale; of all pools for None."""
        return [shape for name, shape in self._shapes.items() if pool in (None, name)]

    def startable(self, pool: str | None) -> list[Shape]:
        """The same of the pools that scale."""
        return [self._shapes[name] for name in self._names(pool) if name in self._shapes]

    def unheard(self, pool: str | None) -> bool:
        """Whether that pool, or any for None, never had a replica: nobody knows what it holds."""
        return any(name not in self._shapes for name in self._all if pool in (None, name))

    def contexts(self, known: Mapping[str, int]) -> dict[str, int]:
        """Pool -> longest prompt + output in tokens: of its largest known replica, or of the last that it had.

        Args:
            known: pool -> that of its largest known replica.
        """
        last = {name: shape.max_context for name, shape in self._shapes.items()}
        return dict(sorted({**last, **known}.items()))

    def may_hold(self, pool: str | None, tokens: int) -> bool:
        """Whether a request of so many tokens is worth waiting with: nobody knows yet what a new pool holds."""
        return any(self._longest(name, tokens) >= tokens for name in self._names(pool))

    def waiting_tokens(self, pool: str, lines: Iterable[Waiting], fleet: Replicas) -> int:
        """Tokens that wait for one pool."""
        if pool not in self._pools:
            return 0
        return sum(line.tokens for line in lines if self._home(line, fleet) == pool)

    def to_wake(self, lines: Iterable[Waiting], fleet: Replicas, now: float) -> tuple[str, ...]:
        """Pools that are to get their first replica: at once where nobody else could serve, else after the delay."""
        wanted: dict[str, bool] = {}
        for line in lines:
            pool = self._home(line, fleet)
            if pool is not None and not fleet.sold(pool):
                others = fleet.sold(line.pool) > 0 and fleet.longest_tokens(line.pool) >= line.longest_tokens
                wanted[pool] = wanted.get(pool, False) or not others
        self._wanted_since = {pool: self._wanted_since.get(pool, now) for pool in wanted}
        return tuple(pool for pool, urgent in wanted.items() if urgent or self._delayed(pool, now))

    def _delayed(self, pool: str, now: float) -> bool:
        return now - self._wanted_since[pool] >= self._pools[pool].upscale_delay_s

    def _home(self, line: Waiting, fleet: Replicas) -> str | None:
        """The pool that is to grow for these requests."""
        open_ = [name for name in self._names(line.pool) if fleet.alive(name) < self._pools[name].max_replicas]
        for name in open_:
            if self._longest(name, line.longest_tokens) >= line.longest_tokens:
                return name
        # The bound is loose, and they were let in because some pool holds them: the largest, if any of these.
        return max(open_, key=lambda name: self._longest(name, 0), default=None)

    def _longest(self, pool: str, unknown: int) -> int:
        shape = self._shapes.get(pool)
        return unknown if shape is None else shape.longest_tokens

    def _names(self, pool: str | None) -> Iterator[str]:
        return (name for name in self._pools if pool in (None, name))
