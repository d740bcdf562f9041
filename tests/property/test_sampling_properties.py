"""Whatever its parameters and its batch-mates: a row draws what it draws alone, and only what its filters leave."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deployments.engine.randomness import splitmix64, uniform32, uniform32_tensor
from deployments.engine.sampling import keep_top_k, keep_top_p, pick_rows, weigh, weight_table
from deployments.engine.sampling_batch import FRACTION_ONE, OCTAVE, WEIGHT_ONE
from deployments.protocol import Sampling
from tests.unit.engine.drawing import Request, tokens

VOCAB = 1500
"""Not of whole segments, so that scores are padded."""
TOKEN = st.integers(0, VOCAB - 1)

samplings = st.builds(
    Sampling,
    max_tokens=st.just(10),
    seed=st.integers(0, 2**64 - 1),
    choice=st.integers(0, 3),
    min_tokens=st.sampled_from([0, 0, 3]),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 0, 1, 5, 40, 1400]),
    top_p=st.sampled_from([1.0, 1.0, 0.1, 0.9, 0.999]),
    min_p=st.sampled_from([0.0, 0.0, 0.05]),
    repetition_penalty=st.sampled_from([1.0, 1.2]),
    frequency_penalty=st.sampled_from([0.0, 0.7]),
    presence_penalty=st.sampled_from([0.0, -0.3]),
    logit_bias=st.lists(st.tuples(TOKEN, st.floats(-10, 10)), max_size=3, unique_by=lambda e: e[0]).map(tuple),
    logprobs=st.sampled_from([None, None, 0, 5]),
    end_ids=st.lists(TOKEN, max_size=2).map(tuple),
)
requests = st.builds(Request, samplings, st.lists(TOKEN, min_size=1, max_size=9), st.lists(TOKEN, max_size=9))


def logits_of(seed: int, rows: int, spread: float, ties: bool) -> Tensor:
    """float32 [rows, VOCAB]; with `ties`, of so few values that most are shared."""
    logits = torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * spread
    return logits.round() if ties else logits


@settings(max_examples=60, deadline=None)
@given(
    batch=st.lists(requests, min_size=2, max_size=6),
    seed=st.integers(0, 1000),
    spread=st.sampled_from([0.1, 2.0, 6.0]),
    ties=st.booleans(),
)
def test_a_row_alone_equals_the_row_in_a_batch(batch: list[Request], seed: int, spread: float, ties: bool) -> None:
    logits = logits_of(seed, len(batch), spread, ties)
    together = tokens(logits, batch)
    for i, one in enumerate(batch):
        assert tokens(logits[i : i + 1], [one]) == together[i : i + 1]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    spread=st.sampled_from([0.003, 0.3, 2.0, 6.0]),
    ties=st.booleans(),
    top_k=st.sampled_from([0, 2, 17, 1400]),
    top_p=st.sampled_from([1.0, 0.05, 0.5, 0.93]),
)
def test_filters_keep_the_set_that_brute_force_finds(
    seed: int, spread: float, ties: bool, top_k: int, top_p: float
) -> None:
    logits = logits_of(seed, 1, spread, ties)
    scores = pick_rows(logits, torch.tensor([0]), (0,))
    keys, weights = weigh(scores, scores.amax(-1), torch.tensor([[OCTAVE / math.log(2)]]), weight_table())
    expected = brute_force_set(keys[0].tolist(), weights[0].tolist(), top_k, math.floor(top_p * FRACTION_ONE))
    if top_k:
        keep_top_k(keys, weights, torch.tensor([top_k]))
    keep_top_p(keys, weights, torch.tensor([math.floor(top_p * FRACTION_ONE)]), weight_table())
    assert set(weights[0].nonzero().flatten().tolist()) == expected


def brute_force_set(keys: list[int], weights: list[int], top_k: int, top_p: int) -> set[int]:
    """One token at a time, in Python's integers."""
    order = sorted(range(VOCAB), key=lambda token: (keys[token], token))[: top_k or VOCAB]
    need = sum(weights[token] for token in order) * top_p >> 32
    kept: set[int] = set()
    mass = 0
    for token in order:
        if kept and mass >= need:
            break
        kept.add(token)
        mass += weights[token]
    return {token for token in kept if weights[token] > 0}


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=300),
    temperature=st.floats(0.05, 20),
)
def test_weights_are_near_the_exponential_and_fall_with_the_score(logits: list[float], temperature: float) -> None:
    scores = pick_rows(torch.tensor([logits]), torch.tensor([0]), (0,))
    scale = OCTAVE / (math.log(2) * temperature)
    _, weights = weigh(scores, scores.amax(-1), torch.tensor([[scale]]), weight_table())
    found = weights[0, : len(logits)].tolist()
    for score, weight in zip(logits, found, strict=True):
        exact = WEIGHT_ONE * math.exp((score - max(logits)) / temperature)
        assert abs(weight - exact) <= exact * 2.0**-16 + 1
    ranked = [weight for _, weight in sorted(zip(logits, found, strict=True))]
    assert ranked == sorted(found)


@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 200), st.integers(0, 2**40)), min_size=1))
def test_both_forms_of_the_hash_agree(cases: list[tuple[int, int, int]]) -> None:
    keys = [splitmix64(seed, choice) for seed, choice, _ in cases]
    signed = torch.tensor([key - 2**64 if key >= 2**63 else key for key in keys])
    got = uniform32_tensor(signed, torch.tensor([position for _, _, position in cases]))
    assert got.tolist() == [uniform32(*case) for case in cases]
