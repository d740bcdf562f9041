"""A step's block tables as paged kernels read them: flat int32 arrays, packed into one buffer so that one copy uploads
them. Where each array starts follows from the number of sequences and rows alone, so that a captured graph finds the
tables of every later step of its size in the same place.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, islice
from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from deployments.engine.attention import RowSpan

_ALIGN = 4
"""Every array starts at a multiple of so many integers: 16 bytes."""
PARTS = 2
"""Of a step, at most, that attention is planned for: decodes, and chunks."""
_SPLIT_UNIT = 64
"""Splits of a sequence are multiples of so many tokens."""
_START, _COUNT, _TABLE = map(attrgetter, ("start", "count", "block_table"))


@dataclass(frozen=True, slots=True)
class Shape:
    """What one step's tables hold."""

    sequences: int
    rows: int
    pages: int
    """Entries of all block tables together."""
    captured: bool = False
    """Whether a graph holds for all steps of so many sequences and rows, however the rows are divided."""
    ahead: int = 0
    """Sequences, the first ones, that are computed by themselves: those of one row, and in a graph those without rows
    that leave room for more. 0: all are computed together."""
    before: int = 0
    """Of a part of a step: rows before its own. Of a whole step that has parts: rows of the first one."""

    @property
    def decodes(self) -> bool:
        """Whether every sequence has one row."""
        return self.sequences == self.rows and not self.captured

    @property
    def size(self) -> int:
        """Integers of the packed tables."""
        return _starts(self.sequences, self.rows)[-1] + self.pages

    def parts(self) -> tuple[Shape, ...]:
        """What attention is planned for and runs on, one after the other: decodes, then chunks.

        A kernel takes tiles of one size for all sequences that it is planned for: a decode beside a chunk would take
        one as large as the chunk's. In a graph the rows of a part are a bound.
        """
        if not self.ahead:
            return (self,)
        rest, rows = self.sequences - self.ahead, self.rows if self.captured else self.rows - self.before
        return (
            Shape(self.ahead, self.ahead, self.pages, self.captured),
            Shape(rest, rows, self.pages, self.captured, before=self.before),
        )


def _sizes(sequences: int, rows: int) -> tuple[int, ...]:
    return (sequences + 1, sequences + 1, sequences, sequences, sequences + 1, 1, rows, rows)


@lru_cache(maxsize=1024)
def _starts(sequences: int, rows: int) -> tuple[int, ...]:
    """Where query_starts, page_starts, last_page_tokens, lengths, split_starts, split_tokens, row_sequences, positions
    and pages start."""
    sizes = _sizes(sequences, rows)
    return tuple(accumulate((-(-size // _ALIGN) * _ALIGN for size in sizes), initial=0))


@dataclass(frozen=True, slots=True)
class Tables:
    """Views of a buffer of packed tables, on the host or on a device; int32."""

    shape: Shape
    query_starts: Tensor
    """[sequences + 1]: first row of each sequence, and the number of rows."""
    page_starts: Tensor
    """[sequences + 1]: first entry of each sequence in `pages`, and the number of entries."""
    last_page_tokens: Tensor
    """[sequences]: tokens in each sequence's last page, those of the step included."""
    lengths: Tensor
    """[sequences]: tokens of each sequence, those of the step included."""
    split_starts: Tensor
    """[sequences + 1]: first split of each decode's keys, and the number of splits."""
    split_tokens: Tensor
    """[1]: tokens of a split; the last of each sequence may have fewer."""
    row_sequences: Tensor
    """[rows]: each row's sequence."""
    positions: Tensor
    """[rows]: each row's position in its sequence."""
    pages: Tensor
    """[pages, or to the buffer's end]: the sequences' blocks."""

    @classmethod
    def view(cls, buffer: Tensor, shape: Shape) -> Tables:
        """The tables in a buffer filled by `pack`, or by a copy of it. `pages` runs to the buffer's end, so that a
        captured graph holds for any number of them."""
        starts = _starts(shape.sequences, shape.rows)
        sizes = _sizes(shape.sequences, shape.rows)
        parts = [buffer[start : start + size] for start, size in zip(starts, sizes, strict=False)]
        parts.append(buffer[starts[-1] :])
        return cls(shape, *parts)

    def parts(self) -> tuple[Tables, ...]:
        """Those of the shape's parts."""
        first, *more = self.shape.parts()
        if not more:
            return (self,)
        return (self._cut(0, first), *(self._cut(first.sequences, part) for part in more))

    def _cut(self, first: int, shape: Shape) -> Tables:
        """The sequences from `first` on, as `shape` says; rows and pages stay counted through the whole step."""
        some, ends = slice(first, first + shape.sequences), slice(first, first + shape.sequences + 1)
        return Tables(
            shape,
            self.query_starts[ends],
            self.page_starts[ends],
            self.last_page_tokens[some],
            self.lengths[some],
            self.split_starts[ends],
            self.split_tokens,
            self.row_sequences,
            self.positions,
            self.pages,
        )


def pack(spans: Sequence[RowSpan], block_size: int, out: NDArray[np.int32], *, splits: int = 1) -> Shape:
    """Write the tables of the spans' rows, in order, to the front of `out`.

    Args:
        splits: of the decodes at the front, at most, beyond one for each.

    Raises:
        ValueError: `out` is too small.
    """
    starts = np.array([*map(_START, spans)], np.int32)
    counts = [*map(_COUNT, spans)]
    if counts.count(1) == len(counts):
        return _pack_singles(spans, starts, block_size, out, splits)
    return _pack_any(spans, starts, np.array(counts, np.int32), block_size, out, splits)


def _pack_any(
    spans: Sequence[RowSpan],
    starts: NDArray[np.int32],
    counts: NDArray[np.int32],
    block_size: int,
    out: NDArray[np.int32],
    splits: int,
) -> Shape:
    lengths = starts + counts
    needs = -(-lengths // block_size)
    rows, page_ends = np.cumsum(counts), np.cumsum(needs)
    shape = _fitting(Shape(len(spans), int(rows[-1]), int(page_ends[-1])), out)
    at = _starts(shape.sequences, shape.rows)
    units = np.where(np.logical_and.accumulate(counts <= 1), -(-lengths // _SPLIT_UNIT), 0)
    out[at[0]] = out[at[1]] = out[at[4]] = 0
    out[at[0] + 1 : at[0] + 1 + len(spans)] = rows
    out[at[1] + 1 : at[1] + 1 + len(spans)] = page_ends
    out[at[2] : at[2] + len(spans)] = lengths - (needs - 1) * block_size
    out[at[3] : at[3] + len(spans)] = lengths
    out[at[4] + 1 : at[4] + 1 + len(spans)], out[at[5]] = _split(units, splits)
    out[at[6] : at[6] + shape.rows] = np.repeat(np.arange(len(spans), dtype=np.int32), counts)
    out[at[7] : at[7] + shape.rows] = np.arange(shape.rows) + np.repeat(lengths - rows, counts)
    out[at[8] : shape.size] = _pages(spans, needs, shape.pages)
    return shape


def _pack_singles(
    spans: Sequence[RowSpan], starts: NDArray[np.int32], block_size: int, out: NDArray[np.int32], splits: int
) -> Shape:
    """The same where each sequence has one row, as in steps that decode: in fewer calls."""
    count, before = len(spans), starts // block_size  # full pages
    page_ends = np.cumsum(before + 1)
    shape = _fitting(Shape(count, count, int(page_ends[-1])), out)
    at = _starts(count, count)
    out[: at[8]] = _same_for_all(count)
    out[at[1] + 1 : at[1] + 1 + count] = page_ends
    out[at[2] : at[2] + count] = starts - (before * block_size - 1)
    out[at[3] : at[3] + count] = starts + 1
    out[at[4] + 1 : at[4] + 1 + count], out[at[5]] = _split(starts // _SPLIT_UNIT + 1, splits)
    out[at[7] : at[7] + count] = starts
    out[at[8] : at[8] + shape.pages] = _pages(spans, before + 1, shape.pages)
    return shape


@lru_cache(maxsize=1024)
def _same_for_all(count: int) -> NDArray[np.int32]:
    """What tables of so many sequences of one row begin with: query_starts and row_sequences, and zeros."""
    at = _starts(count, count)
    tables = np.zeros(at[8], np.int32)
    tables[at[0] : at[0] + count + 1] = np.arange(count + 1)
    tables[at[6] : at[6] + count] = np.arange(count)
    return tables


def _fitting(shape: Shape, out: NDArray[np.int32]) -> Shape:
    if shape.size > len(out):
        raise ValueError(
            f"the block tables of {shape.sequences} sequences with {shape.rows} rows and {shape.pages} blocks are "
            f"{shape.size} integers, and the attention backend was made for {len(out)}"
        )
    return shape


def _split(units: NDArray[np.int32], splits: int) -> tuple[NDArray[np.int32], int]:
    """Where each sequence's splits end, and the tokens of a split, so large that there are `splits` at most beyond one
    for each.

    Args:
        units: what each sequence has to be split, in `_SPLIT_UNIT` tokens; 0 for one that is not split: all from the
            first of several rows on.
    """
    ends = np.cumsum(units)
    each = -(-int(ends[-1]) // splits)
    if each > 1:
        ends = np.cumsum(-(-units // each))
    return ends, max(1, each) * _SPLIT_UNIT


_known: dict[int, bytes] = {}
"""By `id`: the blocks of tables as int32."""
_kept: dict[int, tuple[int, ...]] = {}
"""Those tables, so that none of these ids is used again."""
MOST_KNOWN = 2048
"""Half of them go at once: the newest 1,024 stay, as many as four slots of 256 sequences have."""
MOST_BLOCKS = 2**22
"""Of all of them, were they as long as the newest: 48 MiB. One long sequence has another table for each block."""


def _pages(spans: Sequence[RowSpan], needs: NDArray[np.int32], pages: int) -> NDArray[np.int32]:
    """The first blocks of each table, as many as it needs, one table behind the other."""
    tables = [*map(_TABLE, spans)]
    known: Iterator[Any] = map(_known.get, map(id, tables), tables)
    whole = [blocks if type(blocks) is bytes else _learn(blocks) for blocks in known]
    joined = b"".join(whole)
    if len(joined) > 4 * pages:
        joined = b"".join([blocks[: 4 * need] for blocks, need in zip(whole, needs.tolist(), strict=True)])
    return np.frombuffer(joined, np.int32)


def _learn(table: tuple[int, ...]) -> bytes:
    """A table stays the same object for a block's worth of decodes, and is converted once."""
    if len(_known) >= min(MOST_KNOWN, MOST_BLOCKS // max(1, len(table))):
        for oldest in list(islice(_known, -(-len(_known) // 2))):
            del _known[oldest], _kept[oldest]
    _kept[id(table)] = table
    blocks = _known[id(table)] = array("i", table).tobytes()
    return blocks
