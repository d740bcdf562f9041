"""How a step's tokens are divided between sequences that decode and prompts that are computed."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise, takewhile
from operator import itemgetter

BURST = 32
"""Prompts are a burst from one more in so many sequences that decode. One alone never is."""
CHUNK_SLOWDOWN = Fraction(5, 2)
"""How much longer a step may take for a prompt's chunk while others decode: their p99 then stays within three times
their p50."""
LEAST_CHUNK = 256
"""Of prompts beside decodes, however long it takes: fewer tokens take hardly less time, as weights are read once."""
_FEWEST_COUNTED = 64
"""Decodes of the smallest step that chunks are measured against."""


@dataclass(frozen=True, slots=True)
class Chunks:
    """Prompt tokens that go beside decodes in a step, by how many decode in it and how long their contexts are.

    They fill a step of the rows that were timed, which has a graph of just that size: with one row more it would be the
    next graph's, or have none.

    Raises:
        ValueError: no decodes, times out of order, one of KV below zero, or less than a token.
    """

    decodes: tuple[tuple[int, int], ...]
    """(decodes of a step, microseconds that it takes with contexts of one token), fewer decodes before more."""
    mixed: tuple[tuple[int, int], ...]
    """(rows of a step with decodes and prompts, microseconds that it takes so), fewer rows before more."""
    kv_token_ps: int
    """Picoseconds that either takes for each token of the decodes' contexts."""
    least: int
    """Prompt tokens in any case."""

    def __post_init__(self) -> None:
        ordered = all(before[0] < after[0] for times in (self.decodes, self.mixed) for before, after in pairwise(times))
        if not self.decodes or not ordered or self.kv_token_ps < 0 or self.least < 1:
            raise ValueError(
                "chunks need the time of decodes, the fewer before the more, none below zero for a token of KV, and a "
                f"prompt token at least: {self}"
            )

    @classmethod
    def fixed(cls, tokens: int) -> Chunks:
        """The same, whatever decodes."""
        return cls(((1, 0),), (), 0, tokens)

    def beside(self, decodes: int, kv_tokens: int) -> int:
        """Prompt tokens that fill the largest timed step which takes at most `CHUNK_SLOWDOWN` times as long as its
        decodes alone.

        Args:
            decodes: of the step. They count as the nearest number at or above theirs that was timed, as which they are
                padded, or as the last.
            kv_tokens: of their contexts together.
        """
        place = bisect_left(self.decodes, decodes, key=itemgetter(0))
        count, usual = self.decodes[min(place, len(self.decodes) - 1)]
        larger = self.mixed[bisect_right(self.mixed, count, key=itemgetter(0)) :]
        return max(self.least, rows_within(larger, _limit(usual, self.kv_token_ps, kv_tokens)) - decodes)


def prefill_budget(
    *, decodes: int, kv_tokens: int, decoding: int, prefilling: int, max_batch_tokens: int, chunks: Chunks
) -> int:
    """Most prompt tokens of one step, after its decodes.

    While nothing decodes, prompts take the whole step. Otherwise they take a chunk, so that no sequence waits much
    longer than usual for its next token. A burst of prompts takes as many times the chunk as it is a burst: large
    chunks cost less per token, each prompt done is one more sequence that decodes, and the wait is shared by all.

    Args:
        decodes: tokens that the step decodes.
        kv_tokens: of the contexts that these read, together.
        decoding: sequences, of all slots, that had their first token; all of them wait for this step.
        prefilling: sequences, of all slots, that didn't have it yet, with those that could be admitted now.
        max_batch_tokens: most tokens of a step.
        chunks: prompt tokens that may go beside the decodes of a step at any time.
    """
    left = max_batch_tokens - decodes
    if decoding == 0:
        return left
    return min(left, chunks.beside(decodes, kv_tokens) * max(1, BURST * (prefilling - 1) // decoding))


def quarters(first: int, most: int) -> Iterator[int]:
    """From `first` to `most`: powers of two, and three between each two that divide it evenly.

    Args:
        first: 4 at least.
    """
    for power in range(first.bit_length() - 1, most.bit_length()):
        yield from (size for size in range(2**power, 2 ** (power + 1), 2 ** (power - 2)) if first <= size <= most)


def counted_decodes(most: int) -> tuple[int, ...]:
    """Decodes of the steps that chunks are measured against, where a step has `most` at most: from 64 to fewer than
    `most`, as beside all there is no prompt; `most` where it is no more than 64."""
    return tuple(quarters(_FEWEST_COUNTED, most - 1)) or (min(_FEWEST_COUNTED, most),)


def measured_chunks(
    decodes: Sequence[tuple[int, int]],
    mixed: Iterable[tuple[int, int]],
    *,
    kv_token_ps: int,
    most_kv_tokens: int,
    max_batch_tokens: int,
) -> Chunks:
    """Chunks with which steps take at most `CHUNK_SLOWDOWN` times as long as their decodes alone; `LEAST_CHUNK`
    anyway.

    Args:
        decodes: see `Chunks`, like `kv_token_ps`.
        mixed: see `Chunks`. Read up to the first that is too long beside any of the decodes.
        most_kv_tokens: of the contexts that decodes of a step may have, together.
        max_batch_tokens: most tokens of a step.
    """
    limit = _limit(max(time for _, time in decodes), kv_token_ps, most_kv_tokens)
    times = tuple(_up_to_the_first_over(limit, mixed))
    return Chunks(tuple(decodes), times, kv_token_ps, min(LEAST_CHUNK, max_batch_tokens))


def rows_within(times: Sequence[tuple[int, float]], limit: float) -> int:
    """Rows of the largest step that takes `limit` at most.

    Args:
        times: (rows of a step, how long it takes), fewer rows before more; what comes after one that takes longer than
            the limit doesn't count.
        limit: in the unit of the times.

    Returns:
        Those of the smallest step where none is within the limit, as prompts must end; 0 where there is no step.
    """
    found = list(takewhile(lambda step: step[1] <= limit, times)) or times[:1]
    return found[-1][0] if found else 0


def _limit(usual: int, kv_token_ps: int, kv_tokens: int) -> int:
    """Microseconds that a step with chunks may take without its decodes' contexts, whose KV takes it as long to read as
    the step of decodes that takes `usual` without."""
    kv = kv_token_ps * kv_tokens // 10**6
    return int(CHUNK_SLOWDOWN * (usual + kv)) - kv


def _up_to_the_first_over(limit: int, times: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    for tokens, time in times:
        yield tokens, time
        if time > limit:
            return
