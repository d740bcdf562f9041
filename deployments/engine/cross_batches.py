"""A step of an encoder-decoder as batches: which rows each stack computes, and where their keys and values are.

A sequence's first positions are the encoder's tokens, those behind them the decoder's. One block table holds both: at
an encoder's position what the decoder's cross-attention keeps of the token, at a decoder's what its self-attention
keeps. A sequence's first step computes the encoder whole, so a sequence is fresh (nothing of it is cached) or encoded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from deployments.engine.attention import RowSpan
from deployments.engine.gather import Batch

_WASTE = 2
"""What is gathered for a batch is padded to at most so many times what its sequences hold."""


@dataclass(frozen=True)
class EncoderBatch:
    """Whole prompts, padded on the right."""

    rows: Tensor
    """int64 [B, longest]: rows of the step; padding repeats a prompt's first."""
    mask: Tensor
    """bool [B, longest]: False where padded."""


@dataclass(frozen=True)
class DecoderBatch:
    """Sequences with equally many new tokens."""

    own: Batch
    """Self-attention's."""
    places: Tensor
    """int64 [B, longest]: block * block_size + offset of the encoder's tokens; padding repeats the first."""
    mask: Tensor
    """bool [B, longest]: False where padded."""
    encoded: Tensor | None
    """int64 [B, longest]: rows of the step that hold the encoder's output; None where the cache has it."""


@dataclass(frozen=True)
class _Part:
    """One sequence in a step."""

    first: int
    """Row of its first decoder token."""
    new: int
    own: tuple[int, ...]
    """Places of all its decoder tokens, the new ones last."""
    cross: tuple[int, ...]
    encoder_row: int | None
    """Row of its first encoder token; None where the encoder has run."""


def encoder_batches(spans: Sequence[RowSpan], device: torch.device) -> tuple[EncoderBatch, ...]:
    """The prompts of a step's fresh sequences, padded to no more tokens than the step has rows."""
    firsts = accumulate((span.count for span in spans), initial=0)
    fresh = sorted((s.encoded, first) for first, s in zip(firsts, spans, strict=False) if s.count and not s.start)
    limit, batches, batch = sum(span.count for span in spans), [], list[tuple[int, int]]()
    for count, first in fresh:
        if batch and count * (len(batch) + 1) > limit:
            batches.append(_encoder_batch(batch, device))
            batch = []
        batch.append((count, first))
    return (*batches, _encoder_batch(batch, device)) if batch else ()


def decoder_batches(spans: Sequence[RowSpan], block_size: int, device: torch.device) -> tuple[DecoderBatch, ...]:
    """A step's decoder tokens."""
    firsts = accumulate((span.count for span in spans), initial=0)
    parts = [_part(span, first, block_size) for first, span in zip(firsts, spans, strict=False) if span.count]
    limit = sum(span.count for span in spans)
    kinds: dict[tuple[bool, int], list[_Part]] = {}
    for part in parts:
        kinds.setdefault((part.encoder_row is not None, part.new), []).append(part)
    return tuple(
        _decoder_batch(group, device) for (fresh, _), kind in kinds.items() for group in _groups(kind, fresh, limit)
    )


def _groups(parts: list[_Part], fresh: bool, rows: int) -> Iterator[list[_Part]]:
    """Parts to pad to one length. The encoder's output of fresh ones takes no more rows than the step has, which
    activations are planned for; of the others so much is gathered as decode attention is planned for."""
    group: list[_Part] = []
    for part in sorted(parts, key=lambda each: len(each.cross)):
        more = [*group, part]
        cross, own = len(part.cross), max(len(each.own) for each in more)
        held = sum(len(each.cross) + len(each.own) for each in more)
        if group and ((fresh and cross * len(more) > rows) or (cross + own) * len(more) > _WASTE * held):
            yield group
            more = [part]
        group = more
    yield group


def _part(span: RowSpan, first: int, block_size: int) -> _Part:
    table = span.block_table
    places = tuple(table[p // block_size] * block_size + p % block_size for p in range(span.start + span.count))
    fresh = span.start == 0
    new = span.count - span.encoded if fresh else span.count
    return _Part(
        first=first + span.count - new,
        new=new,
        own=places[span.encoded :],
        cross=places[: span.encoded],
        encoder_row=first if fresh else None,
    )


def _encoder_batch(prompts: Sequence[tuple[int, int]], device: torch.device) -> EncoderBatch:
    rows, mask = _padded([range(first, first + count) for count, first in prompts])
    return EncoderBatch(rows.to(device), mask.to(device))


def _decoder_batch(parts: Sequence[_Part], device: torch.device) -> DecoderBatch:
    new = parts[0].new
    places, mask = _padded([part.cross for part in parts])
    fresh = [range(p.encoder_row, p.encoder_row + len(p.cross)) for p in parts if p.encoder_row is not None]
    past = max(len(part.own) for part in parts) - new
    padding = [past + new - len(part.own) for part in parts]

    def on_device(values: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor([value for row in values for value in row], device=device)

    own = Batch(
        rows=on_device([range(part.first, part.first + new) for part in parts]),
        new=new,
        past=past,
        written=on_device([part.own[len(part.own) - new :] for part in parts]),
        gathered=on_device([part.own[:1] * pad + part.own for part, pad in zip(parts, padding, strict=True)]),
        mask=torch.tensor([[0] * pad + [1] * (past + new - pad) for pad in padding], device=device),
    )
    return DecoderBatch(own, places.to(device), mask.to(device), _padded(fresh)[0].to(device) if fresh else None)


def _padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """int64 [B, longest], each padded on the right with its first, and bool [B, longest], True where it is not."""
    longest = max(map(len, rows))
    values = torch.tensor([[*row, *[row[0]] * (longest - len(row))] for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return values, torch.arange(longest) < lengths[:, None]
