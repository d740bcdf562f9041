"""Which replica a request goes to. Pure: snapshots and a random generator in, a choice out.

    score = (headroom - granted blocks) * block_size        tokens left after the grant

Absolute tokens compare across pools that differ in precision, block size and capacity; percentages do not.
Equal scores are broken at random, because the first of equals would otherwise take every burst.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar


class Candidate(Protocol):
    """What the policy reads of a replica. All integers."""

    @property
    def block_size(self) -> int:
        """Tokens per block."""

    @property
    def capacity_blocks(self) -> int:
        """Blocks that the replica has."""

    @property
    def headroom_blocks(self) -> int:
        """Blocks neither held nor promised; negative when requests grew beyond their grants."""

    @property
    def max_context(self) -> int:
        """Longest prompt + output, in tokens."""


AnyCandidate = TypeVar("AnyCandidate", bound=Candidate)


@dataclass(frozen=True, slots=True)
class Size:
    """How large a request is, in tokens."""

    prompt_tokens: int
    max_tokens: int
    grant_tokens: int
    """Prompt and expected output: what is promised before the request starts."""


def blocks_for(tokens: int, block_size: int) -> int:
    """Blocks that `tokens` fill, rounded up."""
    return -(-tokens // block_size)


def fits_ever(replica: Candidate, size: Size) -> bool:
    """Whether the empty replica could hold the request to its last token."""
    if size.prompt_tokens + size.max_tokens > replica.max_context:
        return False
    return blocks_for(size.prompt_tokens + size.max_tokens, replica.block_size) <= replica.capacity_blocks


def grant_blocks(replica: Candidate, size: Size) -> int:
    """Blocks to promise on this replica; never more than it has."""
    return min(blocks_for(size.grant_tokens, replica.block_size), replica.capacity_blocks)


def score(replica: Candidate, size: Size) -> int:
    """Headroom in tokens that the grant would leave; negative when it doesn't fit now."""
    return (replica.headroom_blocks - grant_blocks(replica, size)) * replica.block_size


def pick(replicas: Iterable[AnyCandidate], size: Size, rng: random.Random) -> AnyCandidate | None:
    """The replica with the best score among those where the request fits now; None when there is none."""
    best: list[AnyCandidate] = []
    best_score = 0
    for replica in replicas:
        if not fits_ever(replica, size):
            continue
        value = score(replica, size)
        if value < 0 or (best and value < best_score):
            continue
        if not best or value > best_score:
            best, best_score = [], value
        best.append(replica)
    if len(best) > 1:
        return rng.choice(best)
    return best[0] if best else None
