"""Forms: which steps a lane's CUDA graphs run, by rows and sequences, and how these are padded. Integers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deployments.engine.attention import RowSpan, StepLayout, singles
from deployments.engine.budget import quarters
from deployments.engine.compiled import FEW_ROWS
from deployments.engine.stages import StepRows

MOST_CAPTURED_ROWS = 768
"""Of one device; on several, graphs of more rows are far apart, and run only steps that fill three fourths of them."""


@dataclass(frozen=True, slots=True)
class Form:
    """The steps that one graph runs: up to so many rows, padded."""

    rows: int
    sequences: int | None = None
    """Of the graph: the step's, and some that pad it; None: each row is one, and all of them are sampled."""
    decodes: int = 0
    """Of the sequences, the first ones: for those of one row, which attention takes apart from the others."""

    def fits(self, step: StepRows) -> bool:
        """Whether a graph of this form can run a step."""
        rows, sequences = len(step.ids), len(step.spans)
        if self.sequences is None:
            return len(step.sampled) == sequences == rows <= self.rows
        if rows > self.rows or (self.rows > MOST_CAPTURED_ROWS and 4 * rows < 3 * self.rows):
            return False
        others = sequences - min(singles(step.spans), self.decodes - 1)
        return others + 2 <= self.sequences - self.decodes

    def layout(self, spans: tuple[RowSpan, ...], rows: int, block_size: int) -> StepLayout:
        """Of a step with `rows` rows, padded to this form."""
        return StepLayout(spans, block_size, self.rows - rows, self.sequences, self.decodes)


def forms(*, max_batch_tokens: int, max_sequences: int, lanes: int = 1) -> tuple[Form, ...]:
    """The graphs of a lane, the smaller before the larger: of decodes, then of steps with chunks.

    Of a decode's graph less than half is padding, beyond 16 rows less than a third. In a step with chunks half of the
    rows may be decodes, and there may be a fourth as many other sequences: FlashInfer's tiles for these are then as
    large as for one long chunk. Of the large graphs that several lanes have at most a fourth is padding, and a step
    that would have more runs without a graph.
    """
    chunks = {64, 128, 192, 256, 320, 384, 512, 640, MOST_CAPTURED_ROWS}
    if lanes > 1:
        chunks |= set(large_sizes(max_batch_tokens))
    return (
        *(Form(rows) for rows in few_sizes(min(max_sequences, max_batch_tokens))),
        *(chunked(rows, max_sequences) for rows in sorted(chunks) if rows <= max_batch_tokens),
    )


def few_sizes(most: int) -> tuple[int, ...]:
    """Rows of the steps that decode, and rows that tokens are drawn for: those there may be are padded to these."""
    sizes = {1, 2, 4, 8, *range(16, 64, 8), *range(64, 128, 16), *range(128, most + 32, 32)}
    return tuple(sorted({min(size, most) for size in sizes}))


def large_sizes(most: int) -> tuple[int, ...]:
    """Rows of steps beyond `MOST_CAPTURED_ROWS`, far apart, and `most`."""
    sizes = {rows for power in range(10, most.bit_length()) for rows in (2**power, 3 * 2**power // 2)}
    return tuple(sorted(rows for rows in sizes | {most} if MOST_CAPTURED_ROWS < rows <= most))


def mixed(*, max_batch_tokens: int, max_sequences: int, lanes: int = 1, beyond: bool) -> tuple[Form, ...]:
    """Steps with chunks, the smaller before the larger, that stand for all: those of `forms`, and `beyond` them some
    that run without a graph on one GPU, each at most a fourth larger than the one before."""
    captured = forms(max_batch_tokens=max_batch_tokens, max_sequences=max_sequences, lanes=lanes)
    found = [form for form in captured if form.sequences is not None]
    if beyond and found:
        larger = quarters(found[-1].rows + 1, max_batch_tokens)
        found += [chunked(rows, max_sequences) for rows in larger]
    return tuple(found)


def usual(*, max_batch_tokens: int, max_sequences: int) -> tuple[Form, ...]:
    """Steps of one row, of few and of many, where there may be so many: what layers are compiled at.

    The numbers are primes, which no head has the size of: the compiler takes two dimensions that are equal at its first
    call for one, and code for as many rows as a head has elements would be for this number alone.
    """
    few, many = min(17, max_batch_tokens), min(251, max_batch_tokens)
    found = [Form(1)]
    if few > 1:
        found.append(Form(few) if few <= max_sequences else chunked(few, max_sequences))
    if many > FEW_ROWS:
        found.append(chunked(many, max_sequences))
    return tuple(found)


def chunked(rows: int, max_sequences: int) -> Form:
    decodes = min(rows // 2, max_sequences) + 1
    return Form(rows, decodes + max(2, rows // 4), decodes)


def drawn(sampled: Sequence[int], *, of: int, there: int, sizes: Sequence[int]) -> int | tuple[int, ...]:
    """Rows that the head takes, `sampled` in front and padded to one of `sizes`: so many first ones, or these.

    Args:
        of: rows of the step.
        there: rows that there are, padding included.
    """
    count = len(sampled)
    rows = next((size for size in sizes if size >= count), count)
    return rows if count == of and rows <= there else (*sampled, *[0] * (rows - count))
