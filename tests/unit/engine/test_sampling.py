"""The sampler's arithmetic: random numbers, weights, filters, penalties, log-probabilities."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper
from transformers.generation.logits_process import MinPLogitsWarper

from deployments.engine.randomness import signed, splitmix64, uniform32, uniform32_tensor
from deployments.engine.sampling import (
    keep_top_k,
    keep_top_p,
    largest,
    log_probabilities,
    penalise,
    pick,
    pick_rows,
    scale,
    weigh,
    weight_table,
)
from deployments.engine.sampling_batch import FRACTION_ONE, OCTAVE, SEGMENT, WEIGHT_ONE
from tests.unit.engine.drawing import draw_requests, request


def weights_of(logits: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """(keys, weights) of logits [n, vocab]."""
    scores = pick_rows(logits, torch.arange(len(logits)), tuple(range(len(logits))))
    scales = torch.full((len(logits), 1), OCTAVE / (math.log(2) * temperature))
    return weigh(scores, scores.amax(-1), scales, weight_table())


@pytest.mark.parametrize("width", [1, 7, 251, 256, 257, 1000, 49152])
def test_the_largest_by_parts_is_the_first_of_the_whole_row(width: int) -> None:
    torch.manual_seed(width)
    scores = torch.randint(0, 9, (40, width)).to(torch.bfloat16)  # full of equals
    scores[1] = -math.inf
    scores[2, width // 2 :] = math.nan
    scores[3, -1] = math.inf
    top, places = largest(scores)
    torch.testing.assert_close(top, scores.max(-1).values, rtol=0, atol=0, equal_nan=True)
    for row, place in zip(scores, places.tolist(), strict=True):
        best = row.isnan() if row.isnan().any() else row == row.max()
        assert place == best.nonzero()[0]


def kept(logits: Tensor, *, top_k: int | None = None, top_p: float | None = None) -> list[int]:
    """Ids that the filters leave of logits [vocab]."""
    keys, weights = weights_of(logits[None])
    if top_k is not None:
        keep_top_k(keys, weights, torch.tensor([top_k]))
    if top_p is not None:
        keep_top_p(keys, weights, torch.tensor([math.floor(top_p * FRACTION_ONE)]), weight_table())
    return weights[0].nonzero().flatten().tolist()


def counts(logits: Tensor, draws: int, **params: Any) -> Tensor:
    """How often each id came up over as many seeds: int64 [vocab]."""
    requests = [request(**{**params, "seed": seed, "position": seed % 13}) for seed in range(draws)]
    return torch.bincount(draw_requests(logits.expand(draws, -1), requests).ids, minlength=len(logits))


def chi_square_fits(observed: Tensor, probabilities: Tensor) -> bool:
    """Pearson's statistic within five standard deviations (sqrt(2 df)) of its mean (df)."""
    possible = probabilities > 0
    if bool(observed[~possible].any()):
        return False
    expected = probabilities[possible].double() * observed.sum()
    assert expected.min() >= 5, "too few draws for the approximation"
    statistic = ((observed[possible] - expected) ** 2 / expected).sum().item()
    freedom = int(possible.sum()) - 1
    return bool(abs(statistic - freedom) < 5 * math.sqrt(2 * freedom))


class TestRandomNumbers:
    def test_splitmix64_matches_the_published_vectors(self) -> None:
        assert [splitmix64(1234567, i) for i in range(5)] == [
            6457827717110365317,
            3203168211198807973,
            9817491932198370423,
            4593380528125082431,
            16408922859458223821,
        ]

    def test_tensor_form_agrees_bit_for_bit(self) -> None:
        seeds = [0, 1, 2**31, 2**63 - 1, 2**63, 2**64 - 1, 0xDEADBEEFCAFEF00D]
        cases = [(s, c, p) for s in seeds for c in (0, 1, 127) for p in (0, 1, 4095, 10**6)]
        keys = torch.tensor([signed(splitmix64(s, c)) for s, c, _ in cases])
        got = uniform32_tensor(keys, torch.tensor([p for _, _, p in cases])).tolist()
        assert got == [uniform32(*case) for case in cases]

    def test_seed_choice_and_position_each_matter(self) -> None:
        numbers = {uniform32(s, c, p) for s in range(10) for c in range(10) for p in range(10)}
        assert len(numbers) == 1000

    def test_numbers_are_even_and_uncorrelated_along_positions(self) -> None:
        numbers = torch.tensor([uniform32(3, 0, p) for p in range(20_000)])
        assert chi_square_fits(torch.bincount(numbers >> 28, minlength=16), torch.full((16,), 1 / 16))
        pairs = (numbers[:-1] >> 30) * 4 + (numbers[1:] >> 30)
        assert chi_square_fits(torch.bincount(pairs, minlength=16), torch.full((16,), 1 / 16))

    @pytest.mark.parametrize("total", [0, 1, 2**30 - 1, 2**30, 2**40, 2**60 - 1, 2**60, 987_654_321_987_654_321])
    def test_scale_is_exact(self, total: int) -> None:
        fractions = [0, 1, 12345, 2**31, 2**32 - 1, 2**32]
        got = scale(torch.full((6,), total), torch.tensor(fractions)).tolist()
        assert got == [total * fraction >> 32 for fraction in fractions]


class TestWeights:
    def test_the_table_is_two_to_the_minus_key(self) -> None:
        exact = [WEIGHT_ONE * 2.0 ** (-i / OCTAVE) for i in range(OCTAVE)]
        table = weight_table().tolist()
        assert table[0] == WEIGHT_ONE
        assert all(a <= b < a + 1.001 for a, b in zip(table, exact, strict=True))

    @pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
    def test_are_within_the_stated_bound_of_the_exponential(self, temperature: float) -> None:
        logits = torch.randn(1, 5000, generator=torch.manual_seed(0)) * 2
        exact = ((logits.double() - logits.max().double()) / temperature).exp() * WEIGHT_ONE
        _, weights = weights_of(logits, temperature)
        error = (weights[:, :5000] - exact).abs()
        assert bool((error <= exact * 2.0**-17 + 1).all())

    def test_far_below_the_likeliest_is_nothing(self) -> None:
        logits = torch.tensor([[0.0, -40 * math.log(2), -41 * math.log(2) - 1e-3, -1e30, -math.inf]])
        assert weights_of(logits)[1][0, :5].tolist() == [WEIGHT_ONE, 1, 0, 0, 0]

    def test_a_large_flat_vocabulary_keeps_its_mass(self) -> None:
        """One likely token against 200,000 that weigh 2**-20 of it each: none of the mass is lost."""
        logits = torch.full((1, 200_000), -20 * math.log(2))
        logits[0, 123_456] = 0.0
        _, weights = weights_of(logits)
        assert (weights.sum() / weights[0, 123_456]).item() == pytest.approx(1 + 199_999 / 2**20, rel=1e-6)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_a_bad_row_weighs_nothing(self, value: float) -> None:
        logits = torch.zeros(2, 300)
        logits[1, 7] = value
        _, weights = weights_of(logits)
        assert weights.sum(-1).tolist() == [300 * WEIGHT_ONE, 0]

    def test_do_not_depend_on_where_the_row_lies(self) -> None:
        """Vectorised float kernels treat the ends of a tensor differently; integers from a table are the same."""
        logits = torch.randn(7, 333, generator=torch.manual_seed(1)) * 3
        _, together = weights_of(logits)
        for i in range(7):
            assert torch.equal(weights_of(logits[i : i + 1])[1][0], together[i])

    def test_rows_are_copied_and_padded(self) -> None:
        logits = torch.randn(4, SEGMENT + 3, dtype=torch.bfloat16)
        for members in ((1, 2), (3, 0)):
            scores = pick_rows(logits, torch.tensor(members), members)
            assert scores.shape == (2, 2 * SEGMENT)
            assert torch.equal(scores[:, : SEGMENT + 3], logits[list(members)].float())
            assert bool((scores[:, SEGMENT + 3 :] == -math.inf).all())


class TestPick:
    def test_finds_where_the_running_sum_passes_the_fraction(self) -> None:
        weights = torch.randint(0, 5, (1, 4 * SEGMENT), generator=torch.manual_seed(2))
        total, sums = int(weights.sum()), weights[0].cumsum(-1)
        for fraction in (0, 1, 2**20, 2**31, 2**32 - 1):
            got = pick(weights, torch.tensor([fraction])).item()
            assert got == int((sums <= (total * fraction >> 32)).sum())
            assert weights[0, int(got)] > 0

    def test_a_row_of_no_weight_ends_at_the_end(self) -> None:
        assert pick(torch.zeros(1, SEGMENT, dtype=torch.int64), torch.tensor([5])).item() == SEGMENT - 1


class TestFilters:
    def test_top_k_breaks_ties_by_id(self) -> None:
        assert kept(torch.tensor([1.0, 3.0, 2.0, 2.0, 2.0]), top_k=3) == [1, 2, 3]

    def test_top_k_counts_ties_across_segments(self) -> None:
        logits = torch.zeros(3 * SEGMENT)
        logits[5::2] = 1.0
        assert kept(logits, top_k=300) == list(range(5, 605, 2))

    def test_top_k_over_the_vocabulary_keeps_all(self) -> None:
        assert kept(torch.zeros(10), top_k=10) == list(range(10))

    def test_top_p_of_equal_tokens_is_the_smallest_set(self) -> None:
        assert kept(torch.zeros(10), top_p=0.9) == list(range(9))

    def test_top_p_keeps_one_at_least(self) -> None:
        logits = torch.randn(30, generator=torch.manual_seed(3))
        assert kept(logits, top_p=1e-6) == kept(logits, top_p=1e-12) == [int(logits.argmax())]

    def test_top_p_of_one_keeps_what_weighs_something(self) -> None:
        assert kept(torch.tensor([0.0, -5.0, -100.0, -1.0]), top_p=1.0) == [0, 1, 3]

    def test_top_p_is_of_what_top_k_left(self) -> None:
        logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
        assert kept(logits, top_p=0.75) == [0, 1, 2]  # 0.4 + 0.3 < 0.75
        assert kept(logits, top_k=2, top_p=0.75) == [0, 1]  # 0.4 / 0.7 < 0.75
        assert kept(logits, top_k=2, top_p=0.55) == [0]

    @pytest.mark.parametrize("spread", [0.01, 0.5, 4.0, 40.0])
    @pytest.mark.parametrize("top_p", [0.1, 0.9, 0.999])
    def test_top_p_is_the_smallest_set_whatever_the_spread(self, spread: float, top_p: float) -> None:
        logits = torch.randn(20_000, generator=torch.manual_seed(4)) * spread
        _, weights = weights_of(logits[None])
        ranked, order = weights[0].sort(descending=True, stable=True)
        need = int(weights.sum()) * math.floor(top_p * FRACTION_ONE) >> 32
        size = int((ranked.cumsum(-1) < need).sum()) + 1
        assert kept(logits, top_p=top_p) == sorted(order[:size].tolist())

    def test_rows_are_cut_each_by_its_own(self) -> None:
        logits = torch.randn(3, 500, generator=torch.manual_seed(5))
        keys, weights = weights_of(logits)
        keep_top_k(keys, weights, torch.tensor([4, 500, 17]))
        assert (weights > 0).sum(-1).tolist() == [4, 500, 17]
        for i, k in ((0, 4), (2, 17)):
            assert set(weights[i].nonzero().flatten().tolist()) == set(logits[i].topk(k).indices.tolist())


class TestDistribution:
    logits = torch.randn(40, generator=torch.manual_seed(1))

    @pytest.mark.parametrize("temperature", [0.7, 1.0, 1.9])
    def test_draws_follow_softmax(self, temperature: float) -> None:
        exact = (self.logits.double() / temperature).softmax(-1)
        assert chi_square_fits(counts(self.logits, 20_000, temperature=temperature), exact)

    def test_the_check_can_fail(self) -> None:
        assert not chi_square_fits(counts(self.logits, 20_000, temperature=1.0), (self.logits / 1.1).softmax(-1))

    @pytest.mark.parametrize(
        "params",
        [
            {"top_k": 7},
            {"top_p": 0.8},
            {"min_p": 0.1},
            {"top_k": 12, "top_p": 0.7},
            {"top_k": 20, "top_p": 0.95, "min_p": 0.05, "temperature": 1.3},
        ],
    )
    def test_filters_leave_what_transformers_leaves(self, params: dict[str, Any]) -> None:
        warpers = LogitsProcessorList()
        if "top_k" in params:
            warpers.append(TopKLogitsWarper(params["top_k"]))
        if "top_p" in params:
            warpers.append(TopPLogitsWarper(params["top_p"]))
        if "min_p" in params:
            warpers.append(MinPLogitsWarper(params["min_p"]))
        scores = (self.logits / params.get("temperature", 1.0))[None]
        exact = warpers(torch.zeros(1, 1, dtype=torch.int64), scores).double().softmax(-1)[0]
        assert chi_square_fits(counts(self.logits, 20_000, **params), exact)

    def test_positions_of_one_request_follow_softmax_too(self) -> None:
        requests = [request(position=i) for i in range(20_000)]
        ids = draw_requests(self.logits.expand(len(requests), -1), requests).ids
        assert chi_square_fits(torch.bincount(ids, minlength=40), self.logits.double().softmax(-1))

    def test_a_token_of_no_probability_is_never_drawn(self) -> None:
        logits = torch.full((50,), -math.inf)
        logits[[3, 17]] = torch.tensor([0.0, -1.0])
        assert counts(logits, 5_000).nonzero().flatten().tolist() == [3, 17]

    def test_min_p_of_one_keeps_the_likeliest(self) -> None:
        assert counts(torch.tensor([0.0, 1.0, 1.0]), 500, min_p=1.0).nonzero().flatten().tolist() == [1, 2]


class TestPenalties:
    width = 64
    prompt = (5, 9, 9, 2, 40)
    output = (9, 11, 11, 11, 3)
    logits = torch.randn(3, 64, generator=torch.manual_seed(5)) * 3

    def penalised(self, repetition: float, frequency: float, presence: float) -> Tensor:
        """Row 1 of three penalised, its history followed by three ids that aren't its own."""
        scores = self.logits.clone()
        ids = torch.tensor([[*self.prompt, *self.output, 33, 5, 11]])
        known = torch.tensor([[1] * 10 + [0] * 3], dtype=torch.int32)
        produced = torch.tensor([[0] * 5 + [1] * 5 + [0] * 3], dtype=torch.int32)
        penalise(scores, torch.tensor([1]), torch.tensor([[repetition, frequency, presence]]), ids, known, produced)
        return scores

    @pytest.mark.parametrize("penalty", [1.3, 0.8])
    def test_repetition_is_transformers_own(self, penalty: float) -> None:
        ids = torch.tensor([[*self.prompt, *self.output]])
        expected = self.logits.clone()
        expected[1:2] = RepetitionPenaltyLogitsProcessor(penalty)(ids, self.logits[1:2].clone())
        torch.testing.assert_close(self.penalised(penalty, 0.0, 0.0), expected, rtol=1e-6, atol=0)

    def test_frequency_and_presence_count_the_output_alone(self) -> None:
        expected = self.logits.clone()
        for token, count in {9: 1, 11: 3, 3: 1}.items():
            expected[1, token] -= 0.5 * count + 0.25
        torch.testing.assert_close(self.penalised(1.0, 0.5, 0.25), expected, rtol=1e-6, atol=1e-6)

    def test_all_apply_in_the_documented_order(self) -> None:
        ids = torch.tensor([[*self.prompt, *self.output]])
        expected = self.logits.clone()
        expected[1:2] = RepetitionPenaltyLogitsProcessor(1.2)(ids, self.logits[1:2].clone())
        for token, count in {9: 1, 11: 3, 3: 1}.items():
            expected[1, token] -= 0.5 * count - 0.25
        torch.testing.assert_close(self.penalised(1.2, 0.5, -0.25), expected, rtol=1e-6, atol=1e-6)


class TestLogProbabilities:
    def test_are_those_of_softmax_best_first(self) -> None:
        logits = torch.randn(2, 30, generator=torch.manual_seed(9)) * 2
        exact = logits.log_softmax(-1)
        chosen, top, ids = log_probabilities(logits, torch.tensor([4, 7]), 5)
        assert chosen.tolist() == pytest.approx([exact[0, 4].item(), exact[1, 7].item()])
        assert torch.equal(ids, exact.topk(5).indices)
        torch.testing.assert_close(top, exact.topk(5).values)

    def test_none_of_the_likeliest(self) -> None:
        chosen, top, ids = log_probabilities(torch.zeros(1, 4), torch.tensor([2]), 0)
        assert chosen.tolist() == pytest.approx([-math.log(4)])
        assert top.shape == ids.shape == (1, 0)

    def test_ties_go_to_the_lowest_ids(self) -> None:
        logits = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0, -math.inf]])
        assert log_probabilities(logits, torch.tensor([0]), 6)[2].tolist() == [[1, 3, 0, 2, 4, 5]]

    def test_bfloat16_is_read_as_it_is(self) -> None:
        logits = torch.randn(2, 50, generator=torch.manual_seed(10)).to(torch.bfloat16)
        chosen, _, _ = log_probabilities(logits, torch.tensor([1, 2]), 0)
        exact = logits.float().log_softmax(-1)
        assert chosen.tolist() == pytest.approx([exact[0, 1].item(), exact[1, 2].item()])
