"""Perplexity of a text under a loaded model, by windows that slide over it.

exp of the mean negative log-likelihood (natural log) per scored token. A window of W tokens starts every S tokens;
positions start at 0 in each, and it scores the tokens that no window before it has scored, each given all tokens before
it in the window. With S < W every token but the text's first is scored once, from the second window on given at least
W - S tokens. With S = W the windows are disjoint, and the first token of each is not scored.
https://huggingface.co/docs/transformers/perplexity
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deployments.engine.attention import RowSpan
from deployments.engine.stages import Stage, StepRows, run_stages


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens [begin, end) of a text, those from `first` on to be scored."""

    begin: int
    first: int
    end: int


@dataclass(frozen=True, slots=True)
class Score:
    """What a text scored."""

    nats: float
    """Sum of the negative log-likelihoods."""
    tokens: int
    """That were scored."""

    @property
    def perplexity(self) -> float:
        """Infinite where it is beyond a float, NaN where a logit was."""
        try:
            return math.exp(self.nats / self.tokens)
        except OverflowError:
            return math.inf


def windows(tokens: int, window: int, stride: int) -> Iterator[Window]:
    """The windows over a text of so many tokens.

    Raises:
        ValueError: a text or window of less than 2 tokens, or a stride that is not 1 to `window`.
    """
    if tokens < 2 or window < 2 or not 1 <= stride <= window:
        raise ValueError(f"no windows of {window} tokens every {stride} over a text of {tokens}")
    scored = 0
    for begin in range(0, tokens, stride):
        end = min(begin + window, tokens)
        if (first := max(scored, begin + 1)) < end:
            yield Window(begin, first, end)
        if end == tokens:
            return
        scored = end


@torch.inference_mode()
def score(
    stages: tuple[Stage, ...], ids: Sequence[int], *, window: int, stride: int, block_size: int, rows: int
) -> Score:
    """Score a text by the stages, one window at a time, in the first blocks of their KV cache.

    Nothing else may run on the stages, and what their blocks held is lost.

    Args:
        ids: of the text.
        window: tokens; the KV cache has room for as many.
        rows: most tokens of a step; all of their logits may be wanted at once.

    Raises:
        ValueError: see `windows`.
    """
    nats, tokens = 0.0, 0
    for each in windows(len(ids), window, stride):
        nats += _nats(stages, ids[each.begin : each.end], each.first - each.begin, block_size, rows)
        tokens += each.end - each.first
    return Score(nats, tokens)


def _nats(stages: tuple[Stage, ...], ids: Sequence[int], first: int, block_size: int, rows: int) -> float:
    """Of `ids[first:]`, each given all before it. The last token is predicted, and not fed."""
    fed = len(ids) - 1
    table = tuple(range(-(-fed // block_size)))
    total = 0.0
    for start in range(0, fed, rows):
        end = min(start + rows, fed)
        sampled = range(max(start, first - 1), end)
        step = StepRows(
            ids=tuple(ids[start:end]),
            positions=tuple(range(start, end)),
            spans=(RowSpan(start, end - start, table),),
            sampled=tuple(row - start for row in sampled),
        )
        logits = run_stages(stages, step, block_size)
        if sampled:
            total += _sum(logits, ids[sampled.start + 1 : sampled.stop + 1])
    return total


def _sum(logits: Tensor, targets: Sequence[int]) -> float:
    """Negative log-likelihoods, summed in float64, of int `targets` under logits [rows, vocab]."""
    wanted = torch.tensor(targets, device=logits.device)
    losses = torch.nn.functional.cross_entropy(logits.float(), wanted, reduction="none")
    return float(losses.double().sum())
