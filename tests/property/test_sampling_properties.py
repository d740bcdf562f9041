"""Whatever its parameters and its batch-mates: a row draws what it draws alone, and only what its filters leave."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deployments.engine.randomness import splitmix64, uniform32, uniform32_tensor
from deployments.engine.sampling import Row, SamplingBatch, _weigh, sample
from deployments.protocol import Sampling

VOCAB = 1500
"""Over the sampler's 1,024 candidates, so that both ways of finding a set run."""
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
histories = st.tuples(st.lists(TOKEN, max_size=8), st.lists(TOKEN, max_size=8))


def logits_of(seed: int, rows: int, spread: float, ties: bool) -> Tensor:
    """float32 [rows, VOCAB]; with `ties`, of so few values that most are shared."""
    logits = torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * spread
    return logits.round() if ties else logits


def make_row(sampling: Sampling, history: tuple[list[int], list[int]]) -> tuple[Row, int]:
    prompt, output = history
    row = Row(sampling, prompt, VOCAB)
    for token in output:
        row.append(token)
    return row, len(prompt) + len(output)


@settings(max_examples=60, deadline=None)
@given(
    requests=st.lists(st.tuples(samplings, histories), min_size=2, max_size=6),
    seed=st.integers(0, 1000),
    spread=st.sampled_from([0.1, 2.0, 6.0]),
    ties=st.booleans(),
)
def test_a_row_alone_equals_the_row_in_a_batch(requests: list[Any], seed: int, spread: float, ties: bool) -> None:
    logits = logits_of(seed, len(requests), spread, ties)
    rows, positions = zip(*(make_row(*request) for request in requests), strict=True)
    together = sample(logits, SamplingBatch.build(rows, vocab_size=VOCAB), positions).read()
    for i, row in enumerate(rows):
        alone = sample(logits[i : i + 1], SamplingBatch.build([row], vocab_size=VOCAB), [positions[i]]).read()
        assert alone == together[i : i + 1]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    spread=st.sampled_from([0.3, 2.0, 6.0]),
    ties=st.booleans(),
    top_k=st.sampled_from([0, 2, 17, 1400]),
    top_p=st.sampled_from([1.0, 0.05, 0.5, 0.93]),
    min_p=st.sampled_from([0.0, 0.02, 0.5]),
)
def test_filters_keep_the_set_that_brute_force_finds(
    seed: int, spread: float, ties: bool, top_k: int, top_p: float, min_p: float
) -> None:
    logits = logits_of(seed, 1, spread, ties)
    row = Row(Sampling(max_tokens=1, seed=0, top_k=top_k, top_p=top_p, min_p=min_p), [], VOCAB)
    drawn = SamplingBatch.build([row], vocab_size=VOCAB).drawn
    assert drawn is not None
    weights = _weigh(logits, logits.amax(-1), torch.tensor([False]), drawn)[0]
    kept = set(weights.nonzero().flatten().tolist())
    assert brute_force_set(logits[0], top_k, top_p, min_p, -1e-6) <= kept
    assert kept <= brute_force_set(logits[0], top_k, top_p, min_p, 1e-6)


def brute_force_set(logits: Tensor, top_k: int, top_p: float, min_p: float, slack: float) -> set[int]:
    """One token at a time in float64. A positive slack takes in what rounding may add, a negative one what it may not
    remove: tokens on the edge of `top_p` or `min_p`, or of a weight below 2**-40."""
    probabilities = logits.double().softmax(-1).tolist()
    order = sorted(range(VOCAB), key=lambda token: (-probabilities[token], token))[: top_k or VOCAB]
    total = sum(probabilities[token] for token in order)
    kept: set[int] = set()
    mass = 0.0
    for token in order:
        if kept and mass >= top_p * total + slack:
            break
        kept.add(token)
        mass += probabilities[token]
    least = max(min_p * (1 - slack), 2.0**-40 if slack < 0 else 0.0) * probabilities[order[0]]
    return {token for token in kept if probabilities[token] >= least}


@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 200), st.integers(0, 2**40)), min_size=1))
def test_both_forms_of_the_hash_agree(cases: list[tuple[int, int, int]]) -> None:
    keys = [splitmix64(seed, choice) for seed, choice, _ in cases]
    signed = torch.tensor([key - 2**64 if key >= 2**63 else key for key in keys])
    got = uniform32_tensor(signed, torch.tensor([position for _, _, position in cases]))
    assert got.tolist() == [uniform32(*case) for case in cases]
