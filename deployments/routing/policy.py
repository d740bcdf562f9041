"""Which replica a request goes to. Pure: snapshots and a random generator in, a choice out.

    shared  = tokens of the prompt that running requests hold there // block_size
    granted = blocks of prompt and expected output - shared
    left    = (headroom - granted) * block_size
    spare   = largest - capacity, where at least half of the replica would be left; 0 elsewhere
    score   = left + spare + cached - ahead

in tokens: the room that the grant leaves; what of the prompt need not be computed there (`cached`, used by running
requests or idle); and off it the prompts that were granted there a moment ago and are computed before (`ahead`). Where
half of a replica is left, more room is of no use to the request, and what is held makes the steps longer that it waits
for: there a replica counts as if it were as large as the largest one, so that the fewest tokens held win, and a large
replica isn't filled first only because it is large. Among equal replicas the two are the same.

A token of room and a token of prefill weigh the same, so a prefix has a bounded pull. Let a replica
have `c` tokens of a prompt cached, `u <= c` of them in use, and another one none. Then the first is preferred just as
long as the other has less than

    u + c <= 2 c

tokens more room. Each request of `s` tokens that follows a prefix in use takes `s - u` of that difference, and while
its prompt is computed as much again as there is to compute of it. So a hot prefix draws at most about
`(u + c) / (s - u)` requests more to its replica than others get; the next one goes to another replica, which has the
prefix too from then on. A long history that one conversation alone has keeps to its replica,
unless that is behind by more than twice its length.

Absolute tokens compare across pools that differ in precision, block size and capacity; percentages do not.
Equal scores are broken at random, because the first of equals would otherwise take every burst.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from deployments.routing.prefixes import NO_MATCH, Match


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
        """Blocks that may be promised: neither held nor promised; negative when requests grew beyond their grants, and
        none at its most requests. Every grant needs one at least."""

    @property
    def max_context(self) -> int:
        """Longest prompt + output, in tokens."""


class Scored(Candidate, Protocol):
    """What else the score reads."""

    @property
    def ahead_tokens(self) -> int:
        """Prompt tokens granted there that are likely not computed yet."""


AnyCandidate = TypeVar("AnyCandidate", bound=Scored)


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


def shared_blocks(replica: Candidate, match: Match) -> int:
    """Blocks of the prompt that running requests hold on this replica."""
    return match.used_tokens // replica.block_size


def grant_blocks(replica: Candidate, size: Size, match: Match = NO_MATCH) -> int:
    """Blocks to promise on this replica, without those that are shared; never more than it has."""
    needed = min(blocks_for(size.grant_tokens, replica.block_size), replica.capacity_blocks)
    return needed - shared_blocks(replica, match)


def blocks_left(replica: Candidate, size: Size, match: Match = NO_MATCH) -> int:
    """Headroom that the grant leaves; negative where the request doesn't fit now."""
    return replica.headroom_blocks - grant_blocks(replica, size, match)


def score(replica: Scored, size: Size, match: Match = NO_MATCH, *, largest: int = 0) -> int:
    """Tokens of room and of work spared, negative when the grant doesn't fit.

    Args:
        replica: where.
        size: of the request.
        match: what of its prompt is cached there.
        largest: capacity of the largest replica that it is compared with, in tokens.
    """
    return _score(replica, blocks_left(replica, size, match), match, largest)


def _score(replica: Scored, left: int, match: Match, largest: int) -> int:
    """The score where the grant leaves `left` blocks."""
    ample = 2 * left >= replica.capacity_blocks
    spare = max(0, largest - replica.capacity_blocks * replica.block_size) if ample else 0
    return left * replica.block_size + spare + match.cached_tokens - replica.ahead_tokens


def pick(
    replicas: Iterable[AnyCandidate],
    size: Size,
    rng: random.Random,
    match_of: Callable[[AnyCandidate], Match] = lambda _: NO_MATCH,
) -> AnyCandidate | None:
    """The replica with the best score among those where the request fits now; None when there is none."""
    replicas = [replica for replica in replicas if fits_ever(replica, size)]
    largest = max((replica.capacity_blocks * replica.block_size for replica in replicas), default=0)
    best: list[AnyCandidate] = []
    best_score = 0
    for replica in replicas:
        match = match_of(replica)
        left = blocks_left(replica, size, match)
        if left < 0:
            continue
        value = _score(replica, left, match, largest)
        if best and value < best_score:
            continue
        if not best or value > best_score:
            best, best_score = [], value
        best.append(replica)
    if len(best) > 1:
        return rng.choice(best)
    return best[0] if best else None
