"""Logits to token ids: one draw per row, with nothing of one row in another's.

Order of processing, per row, in float32:

1. `min_tokens`: end ids are masked until enough tokens were produced.
2. `repetition_penalty` over prompt and output: a logit below 0 is multiplied by it, others are divided by it
   (Keskar et al. 2019, section 4.1, with the sign rule of `transformers`).
3. `frequency_penalty` times the token's count in the output, and `presence_penalty` if that count is not 0
   (OpenAI's formula: both are subtracted).
4. `logit_bias` is added, so that a bias of -100 or 100 decides whatever the penalties did.
5. `temperature`; 0 is greedy: the largest logit, the lowest id among equals.
6. `top_k`, then `top_p` over what `top_k` left, then `min_p`: the order of `transformers`. (vLLM applies `min_p`
   first; the sets differ only when `min_p` and `top_p` are both given.)
7. One draw by inverse CDF.

Log-probabilities are those of the model: the logarithm of the softmax of the raw logits, before any of these steps.
That is vLLM's default (`raw_logprobs`), it stays comparable between requests, and it is finite where a penalty, bias
or filter leaves a probability of 0.

Why a row never depends on its batch-mates:

- The random number of a token is a hash of (seed, choice, position); there is no generator whose state is shared.
- Probabilities are turned into integers before anything is summed over the vocabulary. A float sum depends on how a
  kernel splits it, and kernels choose their split by the number of rows; an integer sum does not. Weights are
  exp(logit - max) in units of 2**-40, so rounding moves less than 2**-20 of the probability mass.
- Equal logits are ranked by id, not by whatever order a sort leaves them in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deployments.engine.randomness import uniform32_tensor
from deployments.engine.sampling_batch import WEIGHT_ONE, Drawn, Row, SamplingBatch, Trim, Wanted
from deployments.protocol import TokenLogprob

__all__ = ["Row", "Sampled", "SampledToken", "SamplingBatch", "sample"]

_FEW = 1024
"""Candidates to try on the CPU before a whole vocabulary is sorted."""


@dataclass(frozen=True, slots=True)
class SampledToken:
    """One row's result on the host."""

    token_id: int
    bad: bool
    """The row's logits held NaN or +inf, or left no token possible: fail its request; `token_id` means nothing."""
    logprob: TokenLogprob | None


@dataclass(frozen=True, slots=True)
class _Logprobs:
    wanted: Wanted
    chosen: Tensor
    """float32 [wanted]."""
    top: Tensor
    """float32 [wanted, most asked for]."""
    top_ids: Tensor
    """int64 [wanted, most asked for]."""

    def read(self, ids: Sequence[int]) -> dict[int, TokenLogprob]:
        chosen, top, top_ids = self.chosen.tolist(), self.top.tolist(), self.top_ids.tolist()
        found = {}
        for i, (row, count) in enumerate(zip(self.wanted.rows, self.wanted.top, strict=True)):
            ranked = sorted(zip(top_ids[i], top[i], strict=True), key=lambda pair: (-pair[1], pair[0]))
            likeliest = tuple(pair for pair in ranked[:count] if pair[1] > -math.inf)
            found[row] = TokenLogprob(ids[row], chosen[i], likeliest)
        return found


@dataclass(frozen=True, slots=True)
class Sampled:
    """A step's draws, still on the device."""

    ids: Tensor
    """int64 [rows]."""
    bad: Tensor
    """bool [rows], see `SampledToken.bad`."""
    logprobs: _Logprobs | None

    def read(self) -> list[SampledToken]:
        """The draws on the host, one per row. Waits for the device."""
        ids, bad = self.ids.tolist(), self.bad.tolist()
        logprobs = {} if self.logprobs is None else self.logprobs.read(ids)
        return [SampledToken(ids[i], bad[i], None if bad[i] else logprobs.get(i)) for i in range(len(ids))]


def sample(logits: Tensor, batch: SamplingBatch, positions: Tensor | Sequence[int]) -> Sampled:
    """Draw one token per row. Doesn't wait for the device, and leaves `logits` as they were.

    Args:
        logits: [rows, vocab], any float dtype.
        batch: built from these rows, in this order.
        positions: [rows], tokens (prompt and output) before the one that is drawn.

    Raises:
        ValueError: `logits` or `positions` are not of the batch's shape.
    """
    if logits.shape != (batch.size, batch.vocab_size) or len(positions) != batch.size:
        raise ValueError(
            f"the batch is {batch.size} rows of {batch.vocab_size} ids, got logits {tuple(logits.shape)} "
            f"and {len(positions)} positions"
        )
    raw = logits.float()
    largest, ids = raw.max(-1)  # the first of equals; NaN wins over everything
    bad = ~largest.isfinite()
    if batch.end_mask or batch.penalised or batch.bias or batch.drawn:
        where = torch.as_tensor(positions, dtype=torch.int64, device=logits.device)
        scores = _process(raw, batch, where)
        if scores is not raw:
            largest, ids = scores.max(-1)
            bad |= ~largest.isfinite()
        if batch.drawn:
            ids = _draw(scores, largest, bad, ids, batch.drawn, where)
    return Sampled(ids, bad, _logprobs(raw, ids, batch.wanted) if batch.wanted else None)


def _process(raw: Tensor, batch: SamplingBatch, positions: Tensor) -> Tensor:
    """Steps 1 to 4; `raw` itself when no row needs them."""
    if not (batch.end_mask or batch.penalised or batch.bias):
        return raw
    scores = raw.clone(memory_format=torch.contiguous_format)
    flat = scores.view(-1)
    if mask := batch.end_mask:
        early = positions[mask.rows] < mask.free_from
        flat[mask.flat] = flat[mask.flat].masked_fill(early, -math.inf)
    if batch.penalised:
        _penalise(flat, batch)
    if batch.bias:
        flat.index_add_(0, *batch.bias)
    return scores


def _penalise(flat: Tensor, batch: SamplingBatch) -> None:
    """Steps 2 and 3 on the ids that the penalised rows have seen; `flat` is the scores as one dimension."""
    samplings = [row.sampling for _, row in batch.penalised]
    seen = [row.seen() for _, row in batch.penalised]
    index = torch.cat([ids + i * batch.vocab_size for (i, _), (ids, _) in zip(batch.penalised, seen, strict=True)])
    counts = torch.cat([counts for _, counts in seen])
    of_row = torch.tensor(
        [(s.repetition_penalty, s.frequency_penalty, s.presence_penalty) for s in samplings], dtype=torch.float32
    ).repeat_interleave(torch.tensor([len(ids) for ids, _ in seen]), dim=0)
    subtract = of_row[:, 1] * counts + of_row[:, 2] * (counts > 0)
    index, repetition, subtract = (t.to(flat.device) for t in (index, of_row[:, 0], subtract))
    score = flat[index]
    flat[index] = torch.where(score < 0, score * repetition, score / repetition) - subtract


def _draw(scores: Tensor, largest: Tensor, bad: Tensor, ids: Tensor, drawn: Drawn, positions: Tensor) -> Tensor:
    """`ids` with the drawn rows' ones replaced (steps 5 to 7)."""
    if drawn.rows is not None:
        scores, largest, bad, positions = (t[drawn.rows] for t in (scores, largest, bad, positions))
    cumulative = _weigh(scores, largest, bad, drawn).cumsum(-1)
    # Below the total, so the first sum above it exists and belongs to a token of weight over 0.
    target = _scale(cumulative[:, -1], uniform32_tensor(drawn.keys, positions))
    picked = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]
    return picked if drawn.rows is None else ids.index_copy(0, drawn.rows, picked)


def _weigh(scores: Tensor, largest: Tensor, bad: Tensor, drawn: Drawn) -> Tensor:
    """Steps 5 and 6: int64 [drawn, vocab], proportional to the probabilities that the filters leave."""
    # A bad row must not reach the integers as NaN: it draws from even scores, and is flagged.
    shifted = (scores - largest[:, None]).masked_fill_(bad[:, None], 0.0)
    # Shifted first, so that a small temperature can't overflow: the likeliest token's weight is exactly one.
    weights = (shifted / drawn.temperatures).exp_().mul_(WEIGHT_ONE).round_().long()
    if drawn.trim:
        rows = drawn.trim.rows
        weights[rows] = weights[rows].masked_fill(~_likeliest(shifted[rows], weights[rows], drawn.trim), 0)
    if drawn.min_weights is not None:
        weights.masked_fill_(weights < drawn.min_weights, 0)
    return weights


def _scale(total: Tensor, fraction: Tensor) -> Tensor:
    """floor(total * fraction / 2**32) without overflow, for total < 2**60 and fraction <= 2**32; int64 [rows]."""
    high, low = total >> 30, total & (2**30 - 1)
    return (high * fraction + ((low * fraction) >> 30)) >> 2


def _likeliest(scores: Tensor, weights: Tensor, trim: Trim) -> Tensor:
    """The tokens that `top_k` and `top_p` keep: bool [rows, vocab].

    On the CPU, sorting a vocabulary costs ten times everything else, and a look at whether a few candidates hold
    `top_p` costs nothing. On a GPU that look would wait for the device, and the sort is cheap.
    """
    if scores.is_cpu and trim.candidates > _FEW and scores.shape[-1] > _FEW:
        ranked, count, enough = _cut(scores, weights, trim, _FEW)
        if bool(enough.all()):
            return _first(scores, ranked, count)
    ranked, count, _ = _cut(scores, weights, trim, trim.candidates)
    return _first(scores, ranked, count)


def _cut(scores: Tensor, weights: Tensor, trim: Trim, candidates: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where the kept tokens end, judged by the `candidates` likeliest of each row.

    Returns:
        (scores of the candidates, descending [rows, candidates]; how many are kept, int64 [rows];
        whether that many candidates were enough to tell, bool [rows]).
    """
    ranked, order = scores.topk(candidates) if candidates < scores.shape[-1] else scores.sort(-1, descending=True)
    rank = torch.arange(candidates, device=scores.device)
    cumulative = weights.gather(-1, order).masked_fill(rank >= trim.top_k[:, None], 0).cumsum(-1)
    found = cumulative[:, -1]
    limited = trim.top_k <= candidates
    target = _scale(torch.where(limited, found, weights.sum(-1)), trim.top_p)
    count = ((cumulative < target[:, None]).sum(-1) + 1).clamp(max=candidates)
    return ranked, count, limited | ((trim.top_k >= scores.shape[-1]) & (found >= target))


def _first(scores: Tensor, ranked: Tensor, count: Tensor) -> Tensor:
    """The `count` [rows] largest of each row, lower ids first among equals: bool [rows, vocab]."""
    last = ranked.gather(-1, count[:, None] - 1)
    above, equal = scores > last, scores == last
    room = count - above.sum(-1, dtype=torch.int32)
    return above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= room[:, None]))


def _logprobs(raw: Tensor, ids: Tensor, wanted: Wanted) -> _Logprobs:
    table = raw[wanted.index].log_softmax(-1)
    chosen = table.gather(-1, ids[wanted.index][:, None])[:, 0]
    most = max(wanted.top)
    if most == 0:
        return _Logprobs(wanted, chosen, table[:, :0], torch.empty_like(table[:, :0], dtype=torch.int64))
    ranked = table.topk(most).values
    kept = _first(table, ranked, torch.full_like(chosen, most, dtype=torch.int64))
    top, top_ids = table.masked_fill(~kept, -math.inf).topk(most)
    return _Logprobs(wanted, chosen, top, top_ids)
