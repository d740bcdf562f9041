"""How a step's tokens are divided between sequences that decode and prompts that are computed."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter

BURST = 32
"""Prompts are a burst from one more in so many sequences that decode. One alone never is."""
CHUNK_SLOWDOWN = 2.5
"""How much longer a step may take for a prompt's chunk while others decode: their p99 then stays within three times
their p50."""
LEAST_CHUNK = 256
"""Of prompts beside decodes, however long it takes: fewer tokens take hardly less time, as weights are read once."""
_FEWEST_COUNTED = 64
"""Decodes of the smallest step that chunks are measured against."""


@dataclass(frozen=True, slots=True)
class Chunks:
    """Prompt tokens that go beside decodes in a step, by how many decode in it.

    What is kept are the rows of whole steps, which have graphs of just that size: with one row more a step would be
    the next graph's, or have none.

    Raises:
        ValueError: no entry, entries out of order, or less than a token.
    """

    entries: tuple[tuple[int, int], ...]
    """(decodes, rows of a step, those included), fewer decodes before more."""
    least: int
    """Prompt tokens in any case."""

    def __post_init__(self) -> None:
        ordered = all(before[0] < after[0] for before, after in pairwise(self.entries))
        if not self.entries or not ordered or self.least < 1:
            raise ValueError(
                "chunks need an entry, the fewer decodes before the more, and a prompt token at least: "
                f"{self.entries}, {self.least}"
            )

    @classmethod
    def fixed(cls, tokens: int) -> Chunks:
        """The same, however many decode."""
        return cls(((1, 0),), tokens)

    def beside(self, decodes: int) -> int:
        """Prompt tokens that fill the step of the entry for so many decodes, or the nearest above, as whose they are
        padded; of the last beyond it."""
        place = bisect_left(self.entries, decodes, key=itemgetter(0))
        rows = self.entries[min(place, len(self.entries) - 1)][1]
        return max(self.least, rows - decodes)


def prefill_budget(*, decodes: int, decoding: int, prefilling: int, max_batch_tokens: int, chunks: Chunks) -> int:
    """Most prompt tokens of one step, after its decodes.

    While nothing decodes, prompts take the whole step. Otherwise they take a chunk, so that no sequence waits much
    longer than usual for its next token. A burst of prompts takes as many times the chunk as it is a burst: large
    chunks cost less per token, each prompt done is one more sequence that decodes, and the wait is shared by all.

    Args:
        decodes: tokens that the step decodes.
        decoding: sequences, of all slots, that had their first token; all of them wait for this step.
        prefilling: sequences, of all slots, that didn't have it yet, with those that could be admitted now.
        max_batch_tokens: most tokens of a step.
        chunks: prompt tokens that may go beside the decodes of a step at any time.
    """
    left = max_batch_tokens - decodes
    if decoding == 0:
        return left
    return min(left, chunks.beside(decodes) * max(1, BURST * (prefilling - 1) // decoding))


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
    decodes: Sequence[tuple[int, float]], mixed: Iterable[tuple[int, float]], *, max_batch_tokens: int
) -> Chunks:
    """Chunks with which steps take at most `CHUNK_SLOWDOWN` times as long as their decodes alone; `LEAST_CHUNK`
    anyway.

    Args:
        decodes: (decodes of a step, how long it takes), fewer before more; one at least.
        mixed: (tokens of a step with decodes and prompts, how long it takes), the smaller before the larger. Read up
            to the first that is too long beside any of the decodes; counts beyond all of them have no entry.
        max_batch_tokens: most tokens of a step.
    """
    limit = CHUNK_SLOWDOWN * max(time for _, time in decodes)
    times = list(_up_to_the_first_over(limit, mixed))
    entries: list[tuple[int, int]] = []
    for count, time in decodes:
        larger = [(tokens, taken) for tokens, taken in times if tokens > count]
        if larger or not entries:
            chunk = chunk_within(larger, limit=CHUNK_SLOWDOWN * time, decodes=count, max_batch_tokens=max_batch_tokens)
            entries.append((count, count + chunk))
    return Chunks(tuple(entries), min(LEAST_CHUNK, max_batch_tokens))


def chunk_within(times: Iterable[tuple[int, float]], *, limit: float, decodes: int, max_batch_tokens: int) -> int:
    """Prompt tokens that go beside so many decodes in a step that takes `limit` at most.

    Args:
        times: (tokens of a step, how long it takes), the smaller before the larger; read up to the first over `limit`.
        limit: in the unit of the times.
        decodes: tokens of such a step that are decodes.
        max_batch_tokens: tokens of a step where no time is given.

    Returns:
        Those of the largest step within the limit. Where none is, those of the smallest: prompts must end.
    """
    most = None
    for tokens, time in _up_to_the_first_over(limit, times):
        if most is None or time <= limit:
            most = tokens
    return max(1, (max_batch_tokens if most is None else most) - decodes)


def _up_to_the_first_over(limit: float, times: Iterable[tuple[int, float]]) -> Iterator[tuple[int, float]]:
    for tokens, time in times:
        yield tokens, time
        if time > limit:
            return
