"""What a sampling step needs of its rows: parameters checked once, and laid out on the device once per batch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deployments.engine.history import BlockTables
from deployments.engine.randomness import signed, splitmix64
from deployments.engine.upload import upload
from deployments.protocol import Sampling
from placement.reserve import SAMPLE_ROWS

MAX_VOCAB = 2**20
"""Keeps a row's summed weights under 2**60, which exact scaling by a 32-bit fraction needs."""
MIN_TEMPERATURE = 1e-5
"""Lower temperatures are greedy, as in vLLM."""
WEIGHT_ONE = 2**40
"""Weight of a row's likeliest token."""
FRACTION_ONE = 2**32
"""1 as a fixed-point fraction: of `top_p` and of random numbers."""
OCTAVE = 2**16
"""Key steps in which a token's weight halves."""
_CPU_SCORES = 2**16
"""Scores that a group has at most on the CPU, if it has two rows: what is worked on stays in the cache."""
SEGMENT = 256
"""Ids whose weights are summed at once where a running sum over the vocabulary is asked for."""


def padded(vocab_size: int) -> int:
    """Ids per row of scores: whole segments, those behind the vocabulary at -inf."""
    return -(-vocab_size // SEGMENT) * SEGMENT


class Row:
    """One request's parameters as the sampler knows them.

    Args:
        sampling: as the request has them.
        prompt_tokens: length of its prompt.
        vocab_size: width of the model's logits.
        encoded: leading prompt tokens that an encoder reads; as in transformers, no penalty counts them.

    Raises:
        ValueError: a parameter is out of range; raised here so that it ends one request and not a batch.
    """

    __slots__ = ("encoded", "greedy", "penalised", "plain", "prompt_tokens", "sampling", "shaped", "top_k", "trimmed")

    def __init__(self, sampling: Sampling, prompt_tokens: int, vocab_size: int, encoded: int = 0) -> None:
        _check(sampling, vocab_size)
        self.sampling = sampling
        self.prompt_tokens = prompt_tokens
        self.encoded = encoded
        self.top_k = min(sampling.top_k or vocab_size, vocab_size)
        """The vocabulary's size where it is off."""
        self.greedy = sampling.temperature < MIN_TEMPERATURE or sampling.top_k == 1
        self.trimmed = self.top_k < vocab_size or sampling.top_p < 1.0
        self.penalised = (
            sampling.repetition_penalty != 1.0 or sampling.frequency_penalty != 0.0 or sampling.presence_penalty != 0.0
        )
        self.shaped = self.penalised or bool(sampling.logit_bias) or sampling.min_tokens > 0
        """Whether its scores may differ from the model's logits."""
        self.plain = self.greedy and not self.shaped and sampling.logprobs is None
        """Whether the model's likeliest token is all that it asks for."""


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
class Penalties:
    """A group's rows with penalties; p of them."""

    members: tuple[int, ...]
    """Rows of the step."""
    tables: BlockTables
    rows: Tensor
    """int64 [p]: rows of the group."""
    factors: Tensor
    """float32 [p, 3]: repetition, frequency, presence."""
    prompt_tokens: Tensor
    """int64 [p, 1]."""
    encoded: Tensor
    """int64 [p, 1]."""


@dataclass(frozen=True, slots=True)
class Bias:
    """A group's logit biases."""

    at: Tensor
    """int64 [entries]: indices into the group's scores as one dimension."""
    values: Tensor
    """float32 [entries]."""


@dataclass(frozen=True, slots=True)
class Trim:
    """`top_k` and `top_p` of the first t rows of a group."""

    top_k: Tensor | None
    """int64 [t], the vocabulary's size where off; None when no row has it."""
    top_p: Tensor | None
    """int64 [t] in units of 2**-32, rounded down: 0.9 of ten equal tokens is nine. None when no row has it."""


@dataclass(frozen=True, slots=True)
class Chance:
    """How a group's rows are drawn; n of them."""

    scales: Tensor
    """float32 [n, 1]: key steps per unit of score."""
    trim: Trim | None
    min_weights: Tensor | None
    """int64 [n, 1]: `min_p` in units of the likeliest token's weight."""


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that are worked on together: all greedy or all drawn, those with `top_k` or `top_p` first.

    Tensors are on the device; what no row of the group needs is None or empty.
    """

    members: tuple[int, ...]
    """Rows of the step."""
    keys: tuple[int, ...]
    """The rows' random keys as int64; empty when they are greedy."""
    ends: tuple[tuple[int, int, int], ...]
    """(row of the step, its `min_tokens`, index of an end id's score in the group's scores as one dimension)."""
    rows: Tensor
    """int64 [n]: `members`."""
    penalties: Penalties | None
    bias: Bias | None
    chance: Chance | None
    """None when the rows are greedy."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Rows with log-probabilities, and how many of the likeliest each asked for."""

    members: tuple[int, ...]
    """Rows of the step."""
    top: tuple[int, ...]
    rows: Tensor
    """int64: `members`, on the device."""


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """What a step needs of its rows, on the device; reusable while the rows and their order stay the same.

    Rows that are greedy and nothing else are in no group: they need an argmax alone. A group has `SAMPLE_ROWS` rows at
    most: the plan's reserve counts on it.
    """

    groups: tuple[Group, ...]
    wanted: tuple[Wanted, ...]

    @classmethod
    def build(cls, rows: Sequence[Row], *, vocab_size: int, device: torch.device) -> SamplingBatch:
        """O(rows) on the host, and one copy per group that nobody waits for."""
        shaped = [i for i, row in enumerate(rows) if row.greedy and row.shaped]
        drawn = sorted((i for i, row in enumerate(rows) if not row.greedy), key=lambda i: not rows[i].trimmed)
        wanted = [i for i, row in enumerate(rows) if row.sampling.logprobs is not None]
        size = _rows_at_once(vocab_size, device)
        parts = (*_chunks(shaped, size), *_chunks(drawn, size))
        return cls(
            tuple(upload(_group(rows, part, vocab_size), device) for part in parts),
            tuple(upload(_wanted(rows, part), device) for part in _chunks(wanted, size)),
        )


def _rows_at_once(vocab_size: int, device: torch.device) -> int:
    if device.type == "cpu":
        return max(1, min(SAMPLE_ROWS, _CPU_SCORES // padded(vocab_size)))
    return SAMPLE_ROWS


def _chunks(members: list[int], size: int) -> Iterator[tuple[int, ...]]:
    return (tuple(members[i : i + size]) for i in range(0, len(members), size))


def _group(rows: Sequence[Row], members: tuple[int, ...], vocab_size: int) -> Group:
    group = [rows[i] for i in members]
    drawn = not group[0].greedy
    width = padded(vocab_size)
    return Group(
        members=members,
        keys=tuple(signed(splitmix64(row.sampling.seed, row.sampling.choice)) for row in group) if drawn else (),
        ends=tuple(
            (member, row.sampling.min_tokens, i * width + end)
            for i, (member, row) in enumerate(zip(members, group, strict=True))
            if row.sampling.min_tokens > 0
            for end in sorted(set(row.sampling.end_ids))
            if end < vocab_size
        ),
        rows=_integers(members),
        penalties=_penalties(group, members),
        bias=_bias(group, width),
        chance=_chance(group, vocab_size) if drawn else None,
    )


def _penalties(group: Sequence[Row], members: tuple[int, ...]) -> Penalties | None:
    found = [i for i, row in enumerate(group) if row.penalised]
    if not found:
        return None
    samplings = [group[i].sampling for i in found]
    return Penalties(
        members=tuple(members[i] for i in found),
        tables=BlockTables(len(found)),
        rows=_integers(found),
        factors=_floats([(s.repetition_penalty, s.frequency_penalty, s.presence_penalty) for s in samplings]),
        prompt_tokens=_integers([group[i].prompt_tokens for i in found])[:, None],
        encoded=_integers([group[i].encoded for i in found])[:, None],
    )


def _bias(group: Sequence[Row], width: int) -> Bias | None:
    entries = {i * width + token: bias for i, row in enumerate(group) for token, bias in row.sampling.logit_bias}
    return Bias(_integers(list(entries)), _floats(list(entries.values()))) if entries else None


def _chance(group: Sequence[Row], vocab_size: int) -> Chance:
    least = [math.ceil(row.sampling.min_p * WEIGHT_ONE) for row in group]
    return Chance(
        scales=_floats([OCTAVE / (math.log(2) * row.sampling.temperature) for row in group])[:, None],
        trim=_trim([row for row in group if row.trimmed], vocab_size),
        min_weights=_integers(least)[:, None] if any(least) else None,
    )


def _trim(trimmed: Sequence[Row], vocab_size: int) -> Trim | None:
    if not trimmed:
        return None
    top_k = [row.top_k for row in trimmed]
    top_p = [math.floor(row.sampling.top_p * FRACTION_ONE) for row in trimmed]
    return Trim(
        _integers(top_k) if min(top_k) < vocab_size else None,
        _integers(top_p) if min(top_p) < FRACTION_ONE else None,
    )


def _wanted(rows: Sequence[Row], members: tuple[int, ...]) -> Wanted:
    return Wanted(members, tuple(rows[i].sampling.logprobs or 0 for i in members), _integers(members))


def _integers(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def _floats(values: Sequence[float] | Sequence[tuple[float, ...]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)
