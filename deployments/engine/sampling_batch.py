"""What a sampling step needs of its rows: parameters checked once, and laid out on the device once per batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deployments.engine.randomness import signed, splitmix64
from deployments.protocol import Sampling

MAX_VOCAB = 2**20
"""Keeps a row's summed weights under 2**60, which exact scaling by a 32-bit fraction needs."""
MIN_TEMPERATURE = 1e-5
"""Lower temperatures are greedy, as in vLLM."""
WEIGHT_ONE = 2**40
"""Weight of a row's likeliest token."""
FRACTION_ONE = 2**32
"""1 as a fixed-point fraction: of `top_p` and of random numbers."""


class Row:
    """One request as the sampler knows it: its parameters, and the token counts that its penalties need.

    Args:
        sampling: the request's parameters.
        prompt_ids: its prompt.
        vocab_size: width of the model's logits.

    Raises:
        ValueError: a parameter is out of range; raised here so that it ends one request and not a batch.
    """

    def __init__(self, sampling: Sampling, prompt_ids: Sequence[int], vocab_size: int) -> None:
        _check(sampling, vocab_size)
        self.sampling = sampling
        self.prompt_tokens = len(prompt_ids)
        self.greedy = sampling.temperature < MIN_TEMPERATURE or sampling.top_k == 1
        self.repetition = sampling.repetition_penalty != 1.0
        self.penalised = self.repetition or sampling.frequency_penalty != 0.0 or sampling.presence_penalty != 0.0
        self._slots: dict[int, int] = {}
        self._ids = torch.empty(0, dtype=torch.int64)
        self._counts = torch.empty(0, dtype=torch.float32)
        if self.repetition:
            self._seat([token for token in dict.fromkeys(prompt_ids) if token < vocab_size])

    def append(self, token_id: int) -> None:
        """Count a produced token. O(1) amortised; nothing to do without penalties."""
        if not self.penalised:
            return
        if token_id not in self._slots:
            self._seat([token_id])
        self._counts[self._slots[token_id]] += 1

    def seen(self) -> tuple[Tensor, Tensor]:
        """(ids int64 [seen], counts in the output float32 [seen]) on the host, each id once.

        Prompt ids are among them only under a repetition penalty; views, valid until the next `append`.
        """
        return self._ids[: len(self._slots)], self._counts[: len(self._slots)]

    def _seat(self, tokens: list[int]) -> None:
        start, end = len(self._slots), len(self._slots) + len(tokens)
        if end > len(self._ids):
            spare = max(64, 2 * end) - len(self._ids)
            self._ids = torch.cat((self._ids, torch.zeros(spare, dtype=torch.int64)))
            self._counts = torch.cat((self._counts, torch.zeros(spare)))
        self._ids[start:end] = torch.tensor(tokens, dtype=torch.int64)
        self._slots.update(zip(tokens, range(start, end), strict=True))


def _check(sampling: Sampling, vocab_size: int) -> None:
    wrong = [
        f"{name} must be {wanted}, got {value}"
        for name, value, good, wanted in (
            ("temperature", sampling.temperature, 0 <= sampling.temperature < math.inf, "0 or more and finite"),
            ("top_k", sampling.top_k, sampling.top_k >= 0, "0 (off) or more"),
            ("top_p", sampling.top_p, 0 < sampling.top_p <= 1, "over 0 and at most 1"),
            ("min_p", sampling.min_p, 0 <= sampling.min_p <= 1, "from 0 to 1"),
            (
                "repetition_penalty",
                sampling.repetition_penalty,
                0 < sampling.repetition_penalty < math.inf,
                "over 0, finite",
            ),
            ("frequency_penalty", sampling.frequency_penalty, math.isfinite(sampling.frequency_penalty), "finite"),
            ("presence_penalty", sampling.presence_penalty, math.isfinite(sampling.presence_penalty), "finite"),
            ("logprobs", sampling.logprobs, 0 <= (sampling.logprobs or 0) <= vocab_size, f"0 to {vocab_size}"),
        )
        if not good
    ]
    for token, bias in sampling.logit_bias:
        if not 0 <= token < vocab_size:
            wrong.append(f"logit_bias names token {token}, but the model's ids are 0 to {vocab_size - 1}")
        if not math.isfinite(bias):
            wrong.append(f"logit_bias of token {token} must be finite, got {bias}")
    if wrong:
        raise ValueError("; ".join(wrong))


@dataclass(frozen=True, slots=True)
class EndMask:
    """End ids that `min_tokens` masks: entry i is `flat[i]` of row `rows[i]`, free from position `free_from[i]` on."""

    flat: Tensor
    rows: Tensor
    free_from: Tensor


@dataclass(frozen=True, slots=True)
class Trim:
    """The drawn rows with `top_k` or `top_p`, by their index among the drawn ones."""

    rows: Tensor
    top_k: Tensor
    """int64, the vocabulary's size where off."""
    top_p: Tensor
    """int64 in units of 2**-32, rounded down: 0.9 of ten equal tokens is nine."""
    candidates: int
    """How many of a row's likeliest tokens decide its set at most."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """The rows that are not greedy."""

    rows: Tensor | None
    """int64, or None when it is all of them."""
    keys: Tensor
    temperatures: Tensor
    """float32 [drawn, 1]."""
    min_weights: Tensor | None
    """int64 [drawn, 1]: `min_p` in units of the likeliest token's weight."""
    trim: Trim | None


@dataclass(frozen=True, slots=True)
class Wanted:
    """The rows with log-probabilities, and how many of the likeliest each asked for."""

    rows: tuple[int, ...]
    index: Tensor
    top: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """What a step needs of its rows, on the device; reusable while the rows and their order stay the same.

    Parts that no row needs are None or empty: an all-greedy batch is only an argmax.
    """

    size: int
    vocab_size: int
    end_mask: EndMask | None
    penalised: tuple[tuple[int, Row], ...]
    bias: tuple[Tensor, Tensor] | None
    """(flat indices int64, values float32)."""
    drawn: Drawn | None
    wanted: Wanted | None

    @classmethod
    def build(cls, rows: Sequence[Row], *, vocab_size: int, device: torch.device | str = "cpu") -> SamplingBatch:
        """O(rows) on the host.

        Raises:
            ValueError: the vocabulary is too large for the integer weights.
        """
        if vocab_size > MAX_VOCAB:
            raise ValueError(f"the sampler's integers hold vocabularies up to {MAX_VOCAB}, this one has {vocab_size}")
        device = torch.device(device)
        return cls(
            size=len(rows),
            vocab_size=vocab_size,
            end_mask=_build_end_mask(rows, vocab_size, device),
            penalised=tuple((i, row) for i, row in enumerate(rows) if row.penalised),
            bias=_build_bias(rows, vocab_size, device),
            drawn=_build_drawn(rows, vocab_size, device),
            wanted=_build_wanted(rows, device),
        )


def _integers(values: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)


def _build_end_mask(rows: Sequence[Row], vocab_size: int, device: torch.device) -> EndMask | None:
    entries = [
        (i * vocab_size + end, i, row.prompt_tokens + row.sampling.min_tokens)
        for i, row in enumerate(rows)
        if row.sampling.min_tokens > 0
        for end in set(row.sampling.end_ids)
        if end < vocab_size
    ]
    if not entries:
        return None
    flat, of_row, free_from = (_integers(column, device) for column in zip(*entries, strict=True))
    return EndMask(flat, of_row, free_from)


def _build_bias(rows: Sequence[Row], vocab_size: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
    entries = {i * vocab_size + token: bias for i, row in enumerate(rows) for token, bias in row.sampling.logit_bias}
    if not entries:
        return None
    return _integers(list(entries), device), torch.tensor(list(entries.values()), dtype=torch.float32, device=device)


def _build_drawn(rows: Sequence[Row], vocab_size: int, device: torch.device) -> Drawn | None:
    drawn = [i for i, row in enumerate(rows) if not row.greedy]
    if not drawn:
        return None
    samplings = [rows[i].sampling for i in drawn]
    min_weights = [math.ceil(s.min_p * WEIGHT_ONE) for s in samplings]
    return Drawn(
        rows=_integers(drawn, device) if len(drawn) < len(rows) else None,
        keys=_integers([signed(splitmix64(s.seed, s.choice)) for s in samplings], device),
        temperatures=torch.tensor([[s.temperature] for s in samplings], dtype=torch.float32, device=device),
        min_weights=_integers(min_weights, device)[:, None] if any(min_weights) else None,
        trim=_build_trim(samplings, vocab_size, device),
    )


def _build_trim(samplings: Sequence[Sampling], vocab_size: int, device: torch.device) -> Trim | None:
    top_k = [min(s.top_k or vocab_size, vocab_size) for s in samplings]
    trimmed = [i for i, s in enumerate(samplings) if top_k[i] < vocab_size or s.top_p < 1.0]
    if not trimmed:
        return None
    return Trim(
        rows=_integers(trimmed, device),
        top_k=_integers([top_k[i] for i in trimmed], device),
        top_p=_integers([math.floor(samplings[i].top_p * FRACTION_ONE) for i in trimmed], device),
        candidates=max(top_k[i] for i in trimmed),
    )


def _build_wanted(rows: Sequence[Row], device: torch.device) -> Wanted | None:
    wanted = [(i, row.sampling.logprobs) for i, row in enumerate(rows) if row.sampling.logprobs is not None]
    if not wanted:
        return None
    index = tuple(i for i, _ in wanted)
    return Wanted(index, _integers(index, device), tuple(top for _, top in wanted))
