"""A step of an encoder-decoder as batches: which rows each stack computes, and where their keys and values are.

A sequence's first positions are the encoder's tokens, those behind them the decoder's. One block table holds both: at
an encoder's position what the decoder's cross-attention keeps of the token, at a decoder's what its self-attention
keeps. A sequence's first step computes the encoder whole, so a sequence is fresh (nothing of it is cached) or encoded.

All of it is laid out on the host, and goes to a stage's device by one copy: sizes that a device would have to tell are
known here already, so that no step waits for one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from deployments.engine.attention import RowSpan
from deployments.engine.gather import Batch
from deployments.engine.stages import StepRows
from placement.encoder_decoder import most_tokens

_WASTE = 2
"""What is gathered for a batch is padded to at most so many times what its sequences hold."""


@dataclass(frozen=True)
class EncoderBatch:
    """Whole prompts, padded on the right."""

    rows: Tensor
    """int64 [B, longest]: rows of the step; padding repeats a prompt's first."""
    mask: Tensor
    """bool [B, longest]: False where padded."""
    kept: Tensor
    """int64: where `mask` is True, as indices into one dimension."""


@dataclass(frozen=True)
class Prompts:
    """Of fresh sequences: what their encoder tokens become in this step."""

    rows: Tensor
    """int64 [B, longest]: rows of the step that hold the encoder's output; padding repeats the first."""
    kept: Tensor
    """int64: those that are no padding, as indices into one dimension."""
    written: Tensor
    """int64: block * block_size + offset that the keys and values of each of `kept` are written to."""


@dataclass(frozen=True)
class DecoderBatch:
    """Sequences with equally many new tokens."""

    own: Batch
    """Self-attention's."""
    places: Tensor
    """int64 [B, longest]: block * block_size + offset of the encoder's tokens; padding repeats the first."""
    mask: Tensor
    """bool [B, longest]: False where padded."""
    fresh: Prompts | None
    """None where the cache has what the encoder made of the prompts."""


@dataclass(frozen=True)
class CrossStep:
    """One step as tensors; made on the host, the same for all stages."""

    ids: Tensor
    """int64 [T]; negative as in `StepItem.ids`."""
    slots: Tensor
    """int64 [T]: the place of each row's token in the KV cache."""
    sampled: Tensor
    """int64: rows whose logits are wanted."""
    encoders: tuple[EncoderBatch, ...]
    decoders: tuple[DecoderBatch, ...]

    @classmethod
    def of(cls, step: StepRows, block_size: int) -> CrossStep:
        """The rows of `step`, those of a sequence's first one its whole prompt and one token of the decoder."""
        longest = max((span.start + span.count for span in step.spans), default=0)
        return cls(
            torch.tensor(step.ids, dtype=torch.int64),
            torch.tensor(step.cache_slots(block_size), dtype=torch.int64),
            torch.tensor(step.sampled, dtype=torch.int64),
            encoder_batches(step.spans),
            decoder_batches(step.spans, block_size, most_tokens(longest)),
        )


@dataclass(frozen=True)
class _Part:
    """One sequence in a step."""

    span: RowSpan
    first: int
    """Row of its first token in the step."""

    @property
    def fresh(self) -> bool:
        return self.span.start == 0

    @property
    def encoded(self) -> int:
        return self.span.encoded

    @property
    def end(self) -> int:
        """Tokens of the sequence with this step."""
        return self.span.start + self.span.count

    @property
    def own(self) -> int:
        """Those of them that are the decoder's."""
        return self.end - self.encoded

    @property
    def new(self) -> int:
        """Decoder tokens of the step."""
        return self.own if self.fresh else self.span.count


def encoder_batches(spans: Sequence[RowSpan]) -> tuple[EncoderBatch, ...]:
    """The prompts of a step's fresh sequences, padded to no more tokens than the step has rows."""
    fresh = sorted((part for part in _parts(spans) if part.fresh), key=lambda part: part.encoded)
    limit, batches, batch = sum(span.count for span in spans), [], list[_Part]()
    for part in fresh:
        if batch and part.encoded * (len(batch) + 1) > limit:
            batches.append(_encoder_batch(batch))
            batch = []
        batch.append(part)
    return (*batches, _encoder_batch(batch)) if batch else ()


def decoder_batches(spans: Sequence[RowSpan], block_size: int, tokens: int) -> tuple[DecoderBatch, ...]:
    """A step's decoder tokens.

    Args:
        tokens: of which a batch gathers keys and values at once at most, unless a sequence alone has more.
    """
    limit = sum(span.count for span in spans)
    kinds: dict[tuple[bool, int], list[_Part]] = {}
    for part in _parts(spans):
        kinds.setdefault((part.fresh, part.new), []).append(part)
    return tuple(
        _decoder_batch(group, block_size)
        for (fresh, _), kind in kinds.items()
        for group in _groups(kind, min(limit, tokens) if fresh else tokens)
    )


def _parts(spans: Sequence[RowSpan]) -> list[_Part]:
    firsts = accumulate((span.count for span in spans), initial=0)
    return [_Part(span, first) for first, span in zip(firsts, spans, strict=False) if span.count]


def _groups(parts: list[_Part], tokens: int) -> Iterator[list[_Part]]:
    """Parts to pad to one length. The encoder's output of fresh ones takes no more rows than the step has, which
    activations are planned for; of all so much is gathered at once as attention is planned for."""
    group: list[_Part] = []
    for part in sorted(parts, key=lambda each: each.encoded):
        more = [*group, part]
        cross, own = part.encoded, max(each.own for each in more)
        held = sum(each.end for each in more)
        if group and (max(cross, own) * len(more) > tokens or (cross + own) * len(more) > _WASTE * held):
            yield group
            more = [part]
        group = more
    yield group


def _encoder_batch(parts: Sequence[_Part]) -> EncoderBatch:
    rows, mask = _encoder_rows(parts)
    return EncoderBatch(rows, mask, _where(mask))


def _decoder_batch(parts: Sequence[_Part], block_size: int) -> DecoderBatch:
    new, past = parts[0].new, max(part.own for part in parts) - parts[0].new
    encoded, ends = _column(part.encoded for part in parts), _column(part.end for part in parts)
    every = _places(parts, block_size)
    rows, mask = _encoder_rows(parts)
    places = every.gather(1, torch.arange(mask.shape[1]).where(mask, 0))
    positions = ends + torch.arange(-past - new, 0)  # padding: before the decoder's first
    gathered = every.gather(1, positions.maximum(encoded))
    own = Batch(
        rows=(_column(part.first + part.span.count - new for part in parts) + torch.arange(new)).flatten(),
        new=new,
        past=past,
        written=gathered[:, past:].flatten(),
        gathered=gathered.flatten(),
        mask=(positions >= encoded).long(),
    )
    fresh = None
    if parts[0].fresh:
        kept = _where(mask)
        fresh = Prompts(rows, kept, places.flatten()[kept])
    return DecoderBatch(own, places, mask, fresh)


def _encoder_rows(parts: Sequence[_Part]) -> tuple[Tensor, Tensor]:
    """int64 [B, longest], rows of encoder tokens as if they were in the step, each padded on the right with its first;
    and bool [B, longest], True where not padded."""
    at = torch.arange(max(part.encoded for part in parts))
    mask = at < _column(part.encoded for part in parts)
    return _column(part.first for part in parts) + at.where(mask, 0), mask


def _places(parts: Sequence[_Part], block_size: int) -> Tensor:
    """int64 [B, longest]: block * block_size + offset of each position of the sequences, and of no more behind them."""
    width = max(len(part.span.block_table) for part in parts)
    tables = torch.tensor([[*part.span.block_table, *[0] * (width - len(part.span.block_table))] for part in parts])
    return (tables[:, :, None] * block_size + torch.arange(block_size)).flatten(1)


def _column(values: Iterable[int]) -> Tensor:
    return torch.tensor(list(values))[:, None]


def _where(mask: Tensor) -> Tensor:
    return mask.flatten().nonzero().flatten()
