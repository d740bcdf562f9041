"""The sampler of the last stage's device: what it keeps between steps, and the one call of a step.

Nothing here waits for the device. What a step uploads is known to the host (lengths, random numbers, block tables) and
goes through pinned memory; what it draws comes back the same way, and is waited for by whoever reads it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import repeat

import torch
from torch import Tensor

from deployments.engine.draw import Draw
from deployments.engine.history import TokenHistory
from deployments.engine.randomness import uniform32_tensor
from deployments.engine.sampling import (
    SampledToken,
    keep_top_k,
    keep_top_p,
    largest,
    likeliest,
    log_probabilities,
    penalise,
    pick,
    pick_rows,
    weigh,
    weight_table,
)
from deployments.engine.sampling_batch import MAX_VOCAB, Chance, Group, Penalties, SamplingBatch, Wanted
from deployments.engine.upload import upload
from deployments.protocol import TokenLogprob
from placement.reserve import SAMPLE_ROWS

SCRATCH_BYTES = 36
"""Of scratch at most, per score of a group's padded rows: float32 scores (4), int32 keys (4), int64 weights, bins and
masked weights (8 each), masks (4). Rows that are only greedy need none."""
_KEPT = 32
"""Batches whose parameters stay on the device: a few for each slot."""


@dataclass(frozen=True, slots=True)
class _Step:
    """What a group needs anew at each step; None where none of its rows does."""

    fractions: Tensor | None
    """int64 [n]: the rows' random numbers."""
    masked: Tensor | None
    """int64: end ids that `min_tokens` masks, as indices into the group's scores as one dimension."""
    lengths: Tensor | None
    """int64 [p, 1]: tokens so far of the rows with penalties."""
    tables: Tensor | None
    """int32 [p, width]: their block tables, where one has changed since the step before."""

    @classmethod
    def of(cls, group: Group, draw: Draw) -> _Step:
        masked = [at for row, min_tokens, at in group.ends if draw.output_count(row) < min_tokens]
        positions = [draw.positions[row] for row in group.members]
        penalties = group.penalties
        return cls(
            fractions=uniform32_tensor(_integers(group.keys), _integers(positions)) if group.keys else None,
            masked=_integers(masked) if masked else None,
            lengths=_integers([draw.positions[row] for row in penalties.members])[:, None] if penalties else None,
            tables=penalties.tables.update([draw.tables[row] for row in penalties.members]) if penalties else None,
        )


def _integers(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


@dataclass(frozen=True, slots=True)
class _Logprobs:
    """Log-probabilities of some rows, on the host or on their way to it."""

    wanted: Wanted
    chosen: Tensor
    top: Tensor
    top_ids: Tensor

    def read(self, ids: list[int]) -> dict[int, TokenLogprob]:
        chosen, top, top_ids = self.chosen.tolist(), self.top.tolist(), self.top_ids.tolist()
        found = {}
        for i, (row, count) in enumerate(zip(self.wanted.members, self.wanted.top, strict=True)):
            ranked = zip(top_ids[i][:count], top[i][:count], strict=True)
            found[row] = TokenLogprob(ids[row], chosen[i], tuple(pair for pair in ranked if pair[1] > -math.inf))
        return found


@dataclass(frozen=True, slots=True)
class Drawn:
    """A step's draws, on their way to the host."""

    ids: Tensor
    """int64 [rows], on the device; always ids of the vocabulary."""
    _host_ids: Tensor
    """int64 [rows] on the host, -1 for a row that is bad."""
    _logprobs: tuple[_Logprobs, ...]
    ready: torch.cuda.Event | None
    """When the host has them; None where nothing runs ahead of it."""

    def read(self) -> list[SampledToken]:
        """The draws on the host, one per row. Waits for this step alone.

        Raises:
            RuntimeError: a row has what no draw leaves, so the host has not read what the device drew.
        """
        if self.ready is not None:
            self.ready.synchronize()
        ids: list[int] = self._host_ids.tolist()
        logprobs: dict[int, TokenLogprob] = {}
        for part in self._logprobs:
            logprobs |= part.read(ids)
        if not logprobs and min(ids, default=0) >= 0:
            return [*map(SampledToken, ids, repeat(False), repeat(None))]
        return [
            SampledToken(token, False, logprobs.get(row)) if token >= 0 else _bad(row, token)
            for row, token in enumerate(ids)
        ]


def _bad(row: int, token: int) -> SampledToken:
    if token != -1:
        raise RuntimeError(f"row {row} of a step drew {token}, which is neither an id nor the mark of a bad row")
    return SampledToken(0, True, None)


class Sampler:
    """Draws the tokens of a replica's steps; all calls in order, on the device's default stream.

    Args:
        device: of the last stage.
        vocab_size: width of the logits.
        num_blocks: KV blocks of the replica, less the scratch block.
        block_size: tokens per block.

    Raises:
        ValueError: the vocabulary is too large for the integer weights.
    """

    def __init__(self, device: torch.device, *, vocab_size: int, num_blocks: int, block_size: int) -> None:
        if vocab_size > MAX_VOCAB:
            raise ValueError(f"the sampler's integers hold vocabularies up to {MAX_VOCAB}, this one has {vocab_size}")
        self.history = TokenHistory(num_blocks, block_size, device)
        self._device = device
        self.vocab_size = vocab_size
        """Width of the logits."""
        self._stream = torch.cuda.default_stream(device) if device.type == "cuda" else None
        self._table = weight_table().to(device)
        self._batch = lru_cache(_KEPT)(partial(SamplingBatch.build, vocab_size=vocab_size, device=device))

    def note_inputs(self, ids: Tensor, slots: Tensor) -> None:
        """Keep a step's input ids, before the step's `draw`. Can be captured in a graph.

        Args:
            ids: int64 or int32 [T], ids of the vocabulary.
            slots: int64 [T], block * block_size + offset, as in the KV cache; the scratch block's for padding.
        """
        self.history.note(ids, slots)

    @torch.inference_mode()
    def draw(self, logits: Tensor, draw: Draw) -> Drawn:
        """One token per row of `logits` [rows, vocab], any float dtype, left as it is.

        Raises:
            ValueError: `logits` are not of the draw's shape.
        """
        if logits.shape != (len(draw.rows), self.vocab_size):
            raise ValueError(f"{len(draw.rows)} rows of {self.vocab_size} ids, but logits are {tuple(logits.shape)}")
        batch = self._batch(draw.rows)
        ids, good = likeliest(logits)
        for group in batch.groups:
            self._draw_group(logits, draw, group, ids, good)
        likely = [self._likely(logits, ids, wanted) for wanted in batch.wanted]
        host_ids = self._to_host(torch.where(good, ids, -1))
        return Drawn(ids, host_ids, tuple(likely), self._event())

    def take(self, found: Tensor) -> Drawn:
        """Each row's likeliest token, where a graph has found it already.

        Args:
            found: int64 [2, rows]: ids of the vocabulary, and the same with -1 for a row that is bad.
        """
        ids, host_ids = found.unbind()
        return Drawn(ids, self._to_host(host_ids), (), self._event())

    def _draw_group(self, logits: Tensor, draw: Draw, group: Group, ids: Tensor, good: Tensor) -> None:
        """Steps 1 to 7 on a group's rows; writes their `ids` [rows] and, where a row turns out bad, `good` [rows]."""
        step = upload(_Step.of(group, draw), self._device)
        scores = pick_rows(logits, group.rows, group.members)
        if step.masked is not None:
            scores.view(-1).index_fill_(0, step.masked, -math.inf)
        if group.penalties is not None and step.lengths is not None:
            self._penalise(scores, group.penalties, step, max(draw.positions[row] for row in group.penalties.members))
        if group.bias is not None:
            scores.view(-1).index_add_(0, group.bias.at, group.bias.values)
        top, picked = largest(scores)
        good.index_copy_(0, group.rows, good.index_select(0, group.rows) & (top.abs() < math.inf))
        if group.chance is not None and step.fractions is not None:
            picked = self._pick(scores, top, group.chance, step.fractions)
        ids.index_copy_(0, group.rows, picked)

    def _penalise(self, scores: Tensor, penalties: Penalties, step: _Step, longest: int) -> None:
        """Steps 2 and 3; for so many rows at once that they have `SAMPLE_ROWS * vocab_size / 4` tokens at most."""
        if step.tables is not None:
            penalties.tables.on_device = step.tables
        blocks = -(-longest // self.history.block_size)
        tokens = blocks * self.history.block_size
        at_once = max(1, SAMPLE_ROWS * self.vocab_size // (4 * tokens))
        position = torch.arange(tokens, device=self._device)
        assert step.lengths is not None
        for i in range(0, len(penalties.members), at_once):
            part = slice(i, i + at_once)
            ids = self.history.gather(penalties.tables.on_device[part, :blocks])
            known = (position < step.lengths[part]) & (position >= penalties.encoded[part])
            produced = known & (position >= penalties.prompt_tokens[part])
            penalise(scores, penalties.rows[part], penalties.factors[part], ids, known.int(), produced.int())

    def _pick(self, scores: Tensor, top: Tensor, chance: Chance, fractions: Tensor) -> Tensor:
        """Steps 5 to 7; overwrites `scores`."""
        keys, weights = weigh(scores, top, chance.scales, self._table)
        if chance.trim is not None:
            keep = chance.trim
            if keep.top_k is not None:
                some = slice(len(keep.top_k))
                keep_top_k(keys[some], weights[some], keep.top_k)
            if keep.top_p is not None:
                some = slice(len(keep.top_p))
                keep_top_p(keys[some], weights[some], keep.top_p, self._table)
        if chance.min_weights is not None:
            weights.masked_fill_(weights < chance.min_weights, 0)
        return pick(weights, fractions).clamp_(max=self.vocab_size - 1)  # a bad row weighs nothing and ends at the end

    def _likely(self, logits: Tensor, ids: Tensor, wanted: Wanted) -> _Logprobs:
        raw, chosen = logits.index_select(0, wanted.rows), ids.index_select(0, wanted.rows)
        found = log_probabilities(raw, chosen, max(wanted.top))
        return _Logprobs(wanted, *(self._to_host(tensor) for tensor in found))

    def _to_host(self, tensor: Tensor) -> Tensor:
        if self._device.type != "cuda":
            return tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    def _event(self) -> torch.cuda.Event | None:
        """Marks where the device is when everything so far has reached the host."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()
        event.record(self._stream)
        return event
