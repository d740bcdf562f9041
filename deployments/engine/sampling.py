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

Why a row never depends on its batch-mates, nor on the device:

- The random number of a token is a hash of (seed, choice, position); there is no generator whose state is shared.
- From step 5 on there are only integers. A token's *key* is how far its score lies below the row's largest, in units
  of 2**-16 octaves; its *weight* is 2**40 times 2**-key, from a table. Kernels choose their split by the number of
  rows and round `exp` each in its own way; integers add up to the same whoever adds them. A weight is within 2**-17 of
  the exact one, and tokens below 2**-40 of the likeliest (together less than 2**-20 of the mass) weigh nothing.
- Tokens of equal keys are ranked by id.

Nothing is sorted: where a filter ends follows from how much weight the keys hold, counted in bins.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import isqrt
from typing import NamedTuple

import torch
from torch import Tensor

from deployments.engine.sampling_batch import OCTAVE, SEGMENT, WEIGHT_ONE, padded
from deployments.protocol import TokenLogprob

_OCTAVE_BITS = OCTAVE.bit_length() - 1
_WEIGHT_BITS = WEIGHT_ONE.bit_length() - 1
_LAST_KEY = (_WEIGHT_BITS + 1) << _OCTAVE_BITS
"""Key of every token that weighs nothing."""
_FINE_BITS = 10
"""A bin is 2**10 keys."""
_BINS = (_LAST_KEY >> _FINE_BITS) + 1


class SampledToken(NamedTuple):
    """One row's result on the host."""

    token_id: int
    bad: bool
    """The row's logits held NaN or +inf, or left no token possible: fail its request; `token_id` means nothing."""
    logprob: TokenLogprob | None


@cache
def weight_table() -> Tensor:
    """2**40 * 2**(-i / 2**16), rounded down, for i in [0, 2**16): int64 on the host, 512 KiB.

    Made of integer square roots: no libm has a say in it.
    """
    bits = 80
    powers, root = [1 << bits], 1 << (bits - 1)
    while len(powers) < OCTAVE:
        root = isqrt(root << bits)
        powers = [p for power in powers for p in (power, power * root >> bits)]
    return torch.tensor([power >> (bits - _WEIGHT_BITS) for power in powers], dtype=torch.int64)


def largest(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row of `scores` [rows, width] the largest, and the first place that has it, int64; NaN is above all.

    By parts of a row first: PyTorch's kernel gives a row to one block of threads, 41 us for 128,256 on an H200.
    """
    parts = _parts_of(scores.shape[1])
    width = scores.shape[1] // parts
    tops, places = scores.view(len(scores), parts, width).max(-1)
    top, part = tops.max(-1)
    return top, torch.add(places.gather(1, part[:, None])[:, 0], part, alpha=width)


def likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's greedy id, int64, and whether the row of `logits` [rows, vocab] is good: its largest is finite."""
    top, ids = largest(logits)
    return ids, top.abs() < torch.inf


@cache
def _parts_of(width: int) -> int:
    """Equal parts that a row is looked through in: as many as there are, up to 256."""
    return max(parts for parts in range(1, 257) if width % parts == 0)


def pick_rows(logits: Tensor, rows: Tensor, members: tuple[int, ...]) -> Tensor:
    """A group's scores to work on: float32 [n, padded vocab], a copy, with -inf behind the vocabulary."""
    first, count, vocab_size = members[0], len(members), logits.shape[1]
    in_a_row = members == tuple(range(first, first + count))
    scores = logits.new_empty(count, padded(vocab_size), dtype=torch.float32)
    scores[:, :vocab_size] = logits[first : first + count] if in_a_row else logits.index_select(0, rows)
    scores[:, vocab_size:].fill_(-torch.inf)
    return scores


def penalise(scores: Tensor, rows: Tensor, factors: Tensor, ids: Tensor, known: Tensor, produced: Tensor) -> None:
    """Steps 2 and 3, in place.

    Args:
        scores: float32 [n, width], contiguous.
        rows: int64 [p], which of them.
        factors: float32 [p, 3]: repetition, frequency, presence.
        ids: int64 [p, tokens], the rows' tokens; any ids where `known` is 0.
        known: int32 [p, tokens], 1 where there is a token of prompt or output.
        produced: int32 [p, tokens], 1 where it is of the output.
    """
    width = scores.shape[1]
    tally = scores.new_zeros(len(rows), width, dtype=torch.int32)
    seen = tally.scatter_add_(1, ids, known).gather(1, ids) > 0
    count = tally.zero_().scatter_add_(1, ids, produced).gather(1, ids)
    repetition, frequency, presence = factors[:, :, None].unbind(1)
    at = (ids + rows[:, None] * width).view(-1)
    score = scores.view(-1).index_select(0, at).view(ids.shape)
    factor = torch.where(seen, repetition, 1.0)
    score = torch.where(score < 0, score * factor, score / factor) - (frequency * count + presence * (count > 0))
    # An id that occurs twice is written twice, both times the same; one that is not the row's stays as it was.
    scores.view(-1).scatter_(0, at, score.view(-1))


def weigh(scores: Tensor, largest: Tensor, scales: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Step 5. Overwrites `scores` [n, width]; a row whose `largest` [n] isn't finite weighs nothing.

    Each operation is rounded by itself and none is a sum of products, so no compiler may fuse a bit away.

    Returns:
        (keys int32 [n, width], weights int64 [n, width]).
    """
    gaps = torch.sub(largest[:, None], scores, out=scores).mul_(scales)
    keys = torch.fmin(gaps, gaps.new_full((), _LAST_KEY), out=gaps).round_().to(torch.int32)  # fmin: NaN is last, too
    return keys, _weights(keys, table)


def keep_top_k(keys: Tensor, weights: Tensor, top_k: Tensor) -> None:
    """Clears in place the weights int64 [n, width] of all but the `top_k` int64 [n] smallest keys."""
    one = weights.new_ones(())
    _keep(keys, weights, one.expand_as(weights), top_k, lambda _: one)


def keep_top_p(keys: Tensor, weights: Tensor, top_p: Tensor, table: Tensor) -> None:
    """Clears in place the weights int64 [n, width] behind the smallest keys that hold `top_p` int64 [n] of the sum, in
    units of 2**-32; the first stays in any case."""
    target = scale(weights.sum(-1), top_p).clamp_(min=1)
    _keep(keys, weights, weights, target, lambda last: _weights(last, table).clamp_(min=1))


def pick(weights: Tensor, fractions: Tensor) -> Tensor:
    """Step 7: where the running sum of `weights` int64 [n, width] passes a fraction of the whole.

    Args:
        fractions: int64 [n] in [0, 2**32), in units of 2**-32.

    Returns:
        int64 [n]: ids of weight over 0; the last id of a row that weighs nothing.
    """
    segments = weights.view(len(weights), -1, SEGMENT)
    sums = segments.sum(-1)
    return _locate(segments, sums, scale(sums.sum(-1), fractions) + 1)


def scale(total: Tensor, fraction: Tensor) -> Tensor:
    """floor(total * fraction / 2**32) without overflow, for total <= 2**60 and fraction <= 2**32; int64 [n]."""
    high, low = total >> 30, total & (2**30 - 1)
    return (high * fraction + ((low * fraction) >> 30)) >> 2


def log_probabilities(logits: Tensor, ids: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of the tokens `ids` int64 [n] and of the `most` likeliest of each row, best first, lower ids first among equals.

    Returns:
        (float32 [n], float32 [n, most], ids int64 [n, most]).
    """
    table = logits.log_softmax(-1, dtype=torch.float32)
    chosen = table.gather(-1, ids[:, None])[:, 0]
    if most == 0:
        return chosen, table[:, :0], ids[:, None][:, :0]
    # The bits of a float as an integer of the same order, and below them the id: no two are equal.
    bits = table.view(torch.int32)
    order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64) << 32
    order |= 0xFFFFFFFF - torch.arange(table.shape[1], device=table.device)
    top = 0xFFFFFFFF - (order.topk(most).values & 0xFFFFFFFF)
    return chosen, table.gather(-1, top), top


def _weights(keys: Tensor, table: Tensor) -> Tensor:
    fraction = (keys & (OCTAVE - 1)).view(-1)
    return table.index_select(0, fraction).view(keys.shape).bitwise_right_shift_(keys >> _OCTAVE_BITS)


def _keep(keys: Tensor, weights: Tensor, values: Tensor, target: Tensor, value_of: Callable[[Tensor], Tensor]) -> None:
    """Clears the weights behind the smallest keys, lower ids first among equals, whose `values` [n, width] sum up to
    `target` [n]; `value_of` a key is that of one token."""
    bins = (keys >> _FINE_BITS).to(torch.int64)
    by_bin = values.new_zeros(len(keys), _BINS).scatter_add_(1, bins, values)
    chosen, before = _first_reaching(by_bin, target)
    outside = bins != chosen[:, None]
    fine = torch.bitwise_and(keys, 2**_FINE_BITS - 1, out=bins)
    by_key = values.new_zeros(len(keys), 2**_FINE_BITS).scatter_add_(1, fine, values.masked_fill(outside, 0))
    low, nearer = _first_reaching(by_key, target - before)
    last = ((chosen << _FINE_BITS) + low).to(torch.int32)
    each = value_of(last)
    room = (target - before - nearer + each - 1) // each
    _clear_behind(keys, weights, last[:, None], room)


def _clear_behind(keys: Tensor, weights: Tensor, last: Tensor, room: Tensor) -> None:
    """Clears the weights of keys above `last` [n, 1], and of that key all but the `room` [n] lowest ids."""
    equal = keys == last
    segments = equal.view(len(keys), -1, SEGMENT)
    end = _locate(segments, segments.sum(-1), room)
    late = torch.arange(keys.shape[1], device=keys.device) > end[:, None]
    weights.masked_fill_((keys > last) | (equal & late), 0)


def _locate(segments: Tensor, sums: Tensor, target: Tensor) -> Tensor:
    """Where the running sum over all segments [n, segments, SEGMENT] reaches `target` [n]; the last id if nowhere."""
    segment, before = _first_reaching(sums, target)
    inside = segments.gather(1, segment[:, None, None].expand(-1, 1, SEGMENT))[:, 0]
    offset, _ = _first_reaching(inside.to(torch.int64), target - before)
    return segment * SEGMENT + offset


def _first_reaching(values: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(the first index at which the running sum of `values` int64 [n, m] reaches `target` [n], the sum before it)."""
    sums = values.cumsum(-1)
    index = (sums < target[:, None]).sum(-1, keepdim=True).clamp_(max=values.shape[1] - 1)
    return index[:, 0], (sums - values).gather(1, index)[:, 0]
