"""What the replicas say of themselves, and what must hold of it. Knows nothing of the ledger.

A replica is over-committed when, at the moment in which it takes a request up, the blocks of all its requests together
(of each the more of what it was granted and what it holds) are more than it has. Without grants a request counts for
its prompt, which is the least that it will hold.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Look:
    """One replica at one instant; counts are blocks unless they say otherwise."""

    replica_id: str
    pool: str
    capacity: int
    granted: int
    """Sum of the grants (or prompts) of its requests."""
    held: int
    """In use by its requests, by its own block accounts."""
    charged: int
    """Sum over its requests of the more of granted and held."""
    taken_up: int
    """Requests so far."""
    over_at_take_up: int
    """Of them, requests that found it, or made it, over-committed."""
    most_over: int
    """Largest excess of `charged` over `capacity` at a take-up."""
    preemptions: int
    """So far."""


@dataclass(frozen=True, slots=True)
class Account:
    """All looks of one run."""

    samples: int
    replicas: int
    taken_up: int
    over_at_take_up: int
    most_over: int
    over_at_samples: int
    """Samples with more charged than there is: also those where requests grew beyond their grants."""
    granted_over: int
    """Samples with more granted than there is."""
    held_over: int
    """Samples with more held than there is."""
    preemptions: int
    peak_share: float
    """Highest share of a replica's blocks that was charged."""

    @classmethod
    def of(cls, looks: Iterable[Look]) -> Account:
        """Sum up; a replica's counters count as of its last look."""
        seen = list(looks)
        last = {look.replica_id: look for look in seen}
        return cls(
            samples=len(seen),
            replicas=len(last),
            taken_up=sum(look.taken_up for look in last.values()),
            over_at_take_up=sum(look.over_at_take_up for look in last.values()),
            most_over=max((look.most_over for look in last.values()), default=0),
            over_at_samples=sum(look.charged > look.capacity for look in seen),
            granted_over=sum(look.granted > look.capacity for look in seen),
            held_over=sum(look.held > look.capacity for look in seen),
            preemptions=sum(look.preemptions for look in last.values()),
            peak_share=max((look.charged / look.capacity for look in seen), default=0.0),
        )


class Observer:
    """Collects looks; an actor of its own that replicas send them to."""

    def __init__(self) -> None:
        self._looks: list[Look] = []

    async def see(self, look: Look) -> None:
        """One more."""
        self._looks.append(look)

    async def account(self) -> Account:
        """What was seen so far."""
        return Account.of(self._looks)

    async def idle(self, replicas: int) -> bool:
        """Whether so many replicas were seen, and none of them had anything the last time."""
        last = {look.replica_id: look for look in self._looks}
        return len(last) == replicas and not any(look.granted or look.held for look in last.values())
