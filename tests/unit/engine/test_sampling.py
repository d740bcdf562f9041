"""The sampler: its random numbers, each step of its processing, and that a row's result is its own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper
from transformers.generation.logits_process import MinPLogitsWarper

from deployments.engine.randomness import splitmix64, uniform32, uniform32_tensor
from deployments.engine.sampling import Row, SampledToken, SamplingBatch, _process, _scale, _weigh, sample
from deployments.engine.sampling_batch import MAX_VOCAB, Drawn
from deployments.protocol import Sampling


def row(vocab_size: int, prompt: list[int] | None = None, output: list[int] | None = None, **params: Any) -> Row:
    made = Row(Sampling(**{"max_tokens": 100, "seed": 7, **params}), prompt or [], vocab_size)
    for token in output or []:
        made.append(token)
    return made


def draw(logits: Tensor, rows: list[Row], positions: list[int] | None = None) -> list[SampledToken]:
    batch = SamplingBatch.build(rows, vocab_size=logits.shape[-1])
    return sample(logits, batch, positions or [0] * len(rows)).read()


def built(rows: list[Row], vocab_size: int) -> Drawn:
    drawn = SamplingBatch.build(rows, vocab_size=vocab_size).drawn
    assert drawn is not None
    return drawn


def counts(logits: Tensor, draws: int, **params: Any) -> Tensor:
    """How often each id came up over as many seeds: int64 [vocab]."""
    vocab_size = len(logits)
    rows = [row(vocab_size, **{**params, "seed": seed}) for seed in range(draws)]
    batch = SamplingBatch.build(rows, vocab_size=vocab_size)
    ids = sample(logits.expand(draws, -1), batch, [seed % 13 for seed in range(draws)]).ids
    return torch.bincount(ids, minlength=vocab_size)


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
        rows = [row(4, seed=s, choice=c) for s, c, _ in cases]
        got = uniform32_tensor(built(rows, 4).keys, torch.tensor([p for _, _, p in cases])).tolist()
        assert got == [uniform32(*case) for case in cases]

    def test_seed_choice_and_position_each_matter(self) -> None:
        numbers = {uniform32(s, c, p) for s in range(10) for c in range(10) for p in range(10)}
        assert len(numbers) == 1000

    def test_numbers_are_even_and_uncorrelated_along_positions(self) -> None:
        numbers = torch.tensor([uniform32(3, 0, p) for p in range(20_000)])
        assert chi_square_fits(torch.bincount(numbers >> 28, minlength=16), torch.full((16,), 1 / 16))
        pairs = (numbers[:-1] >> 30) * 4 + (numbers[1:] >> 30)
        assert chi_square_fits(torch.bincount(pairs, minlength=16), torch.full((16,), 1 / 16))

    @pytest.mark.parametrize("total", [0, 1, 2**30 - 1, 2**30, 2**40, 2**60 - 1, 987_654_321_987_654_321])
    def test_scale_is_exact(self, total: int) -> None:
        fractions = [0, 1, 12345, 2**31, 2**32 - 1, 2**32]
        got = _scale(torch.full((6,), total), torch.tensor(fractions)).tolist()
        assert got == [total * fraction >> 32 for fraction in fractions]


class TestGreedy:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_is_argmax(self, dtype: torch.dtype) -> None:
        logits = torch.randn(5, 1000, generator=torch.manual_seed(0)).to(dtype)
        got = [d.token_id for d in draw(logits, [row(1000, temperature=0.0)] * 5)]
        assert got == logits.float().argmax(-1).tolist()

    def test_lowest_id_wins_a_tie(self) -> None:
        logits = torch.tensor([[0.0, 2.0, 1.0, 2.0, 2.0]])
        greedy = [row(5, temperature=0.0), row(5, temperature=1e-9), row(5, top_k=1)]
        assert [draw(logits, [r])[0].token_id for r in greedy] == [1, 1, 1]

    def test_batch_builds_nothing_it_does_not_need(self) -> None:
        batch = SamplingBatch.build([row(5, temperature=0.0)] * 2, vocab_size=5)
        assert (batch.end_mask, batch.penalised, batch.bias, batch.drawn, batch.wanted) == (None, (), None, None, None)


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
        rows = [row(40)] * 20_000
        batch = SamplingBatch.build(rows, vocab_size=40)
        ids = sample(self.logits.expand(len(rows), -1), batch, torch.arange(len(rows))).ids
        assert chi_square_fits(torch.bincount(ids, minlength=40), self.logits.double().softmax(-1))

    def test_a_large_flat_vocabulary_keeps_its_mass(self) -> None:
        """One likely token against 200,000 that weigh 2**-20 of it each: none of the mass is lost."""
        logits = torch.full((200_000,), -20 * math.log(2))
        logits[123_456] = 0.0
        weights = _weigh(logits[None], torch.zeros(1), torch.tensor([False]), built([row(200_000)], 200_000))
        assert (weights.sum() / weights[0, 123_456]).item() == pytest.approx(1 + 199_999 / 2**20, rel=1e-6)

    def test_a_token_of_no_probability_is_never_drawn(self) -> None:
        logits = torch.full((50,), -math.inf)
        logits[[3, 17]] = torch.tensor([0.0, -1.0])
        assert counts(logits, 5_000).nonzero().flatten().tolist() == [3, 17]

    def test_a_tiny_temperature_does_not_overflow(self) -> None:
        assert not draw(torch.tensor([[1e30, 3e38, -3e38]]), [row(3, temperature=2e-5)])[0].bad
        assert draw(torch.tensor([[1e30, 3e38, -3e38]]), [row(3, temperature=2e-5)])[0].token_id == 1


class TestFilters:
    def test_top_k_breaks_ties_by_id(self) -> None:
        logits = torch.tensor([1.0, 3.0, 2.0, 2.0, 2.0])
        assert counts(logits, 3_000, top_k=3).nonzero().flatten().tolist() == [1, 2, 3]

    def test_top_p_of_equal_tokens_is_the_smallest_set(self) -> None:
        assert counts(torch.zeros(10), 5_000, top_p=0.9).nonzero().flatten().tolist() == list(range(9))

    def test_top_p_keeps_one_at_least(self) -> None:
        logits = torch.randn(30, generator=torch.manual_seed(3))
        assert counts(logits, 300, top_p=1e-6).nonzero().flatten().tolist() == [int(logits.argmax())]

    def test_min_p_of_one_keeps_the_likeliest(self) -> None:
        assert counts(torch.tensor([0.0, 1.0, 1.0]), 500, min_p=1.0).nonzero().flatten().tolist() == [1, 2]

    def test_top_k_over_the_vocabulary_is_off(self) -> None:
        assert built([row(10, top_k=1000)], 10).trim is None

    @pytest.mark.parametrize("spread", [0.1, 4.0])
    def test_a_large_vocabulary_needs_no_full_sort_to_be_right(self, spread: float) -> None:
        """4.0: a thousand candidates hold 0.9; 0.1: they do not, and the whole vocabulary is sorted."""
        vocab_size = 20_000
        logits = torch.randn(vocab_size, generator=torch.manual_seed(4)) * spread
        ordered, order = logits.double().softmax(-1).sort(descending=True)
        kept = set(order[: int((ordered.cumsum(-1) < 0.9).sum()) + 1].tolist())
        assert (len(kept) < 1024) == (spread == 4.0)
        got = set(counts(logits, 400, top_p=0.9).nonzero().flatten().tolist())
        assert got <= kept


class TestPenalties:
    vocab_size = 60
    prompt = (5, 9, 9, 2, 40)
    output = (9, 11, 11, 11, 3)

    def processed(self, **params: Any) -> Tensor:
        """What steps 1 to 4 make of `logits`."""
        made = row(self.vocab_size, list(self.prompt), list(self.output), temperature=0.0, **params)
        batch = SamplingBatch.build([made], vocab_size=self.vocab_size)
        return _process(self.logits, batch, torch.tensor([len(self.prompt) + len(self.output)]))

    logits = torch.randn(1, 60, generator=torch.manual_seed(5)) * 3

    @pytest.mark.parametrize("penalty", [1.3, 0.8])
    def test_repetition_is_transformers_own(self, penalty: float) -> None:
        ids = torch.tensor([[*self.prompt, *self.output]])
        exact = RepetitionPenaltyLogitsProcessor(penalty)(ids, self.logits.clone())
        torch.testing.assert_close(self.processed(repetition_penalty=penalty), exact, rtol=1e-6, atol=0)

    def test_frequency_and_presence_count_the_output_alone(self) -> None:
        expected = self.logits.clone()
        for token, count in {9: 1, 11: 3, 3: 1}.items():
            expected[0, token] -= 0.5 * count + 0.25
        got = self.processed(frequency_penalty=0.5, presence_penalty=0.25)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)

    def test_all_penalties_and_bias_apply_in_the_documented_order(self) -> None:
        ids = torch.tensor([[*self.prompt, *self.output]])
        expected = RepetitionPenaltyLogitsProcessor(1.2)(ids, self.logits.clone())
        for token, count in {9: 1, 11: 3, 3: 1}.items():
            expected[0, token] -= 0.5 * count - 0.25
        expected[0, 11] += 4.0
        expected[0, 50] -= 100.0
        got = self.processed(
            repetition_penalty=1.2,
            frequency_penalty=0.5,
            presence_penalty=-0.25,
            logit_bias=((11, 4.0), (50, -100.0)),
        )
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)

    def test_appending_keeps_the_counts(self) -> None:
        made = row(1000, [1, 2, 2], list(range(500)) * 2, repetition_penalty=1.1)
        ids, seen = made.seen()
        assert dict(zip(ids.tolist(), seen.tolist(), strict=True)) == dict.fromkeys(range(500), 2.0)

    def test_prompt_ids_beyond_the_logits_are_left_out(self) -> None:
        assert row(10, [3, 12], repetition_penalty=1.1).seen()[0].tolist() == [3]

    def test_the_callers_logits_are_left_as_they_were(self) -> None:
        before = self.logits.clone()
        draw(self.logits, [row(60, [1], [2], repetition_penalty=2.0, logit_bias=((3, 9.0),), top_k=5)])
        assert torch.equal(self.logits, before)


class TestBiasAndMinTokens:
    def test_bias_decides(self) -> None:
        logits = torch.randn(1, 20, generator=torch.manual_seed(6))
        assert draw(logits, [row(20, logit_bias=((13, 100.0),))])[0].token_id == 13

    def test_end_ids_are_masked_until_min_tokens(self) -> None:
        logits = torch.zeros(1, 6)
        logits[0, [4, 5]] = torch.tensor([9.0, 8.0])
        made = row(6, [0, 0, 0], temperature=0.0, min_tokens=2, end_ids=(4, 5, 99))
        got = [draw(logits, [made], [position])[0].token_id for position in (3, 4, 5, 6)]
        assert got == [0, 0, 4, 4]


class TestBadLogits:
    @pytest.mark.parametrize("params", [{"temperature": 0.0}, {}, {"top_p": 0.5}, {"min_p": 0.2}, {"logprobs": 2}])
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_only_the_row_at_fault_is_flagged(self, value: float, params: dict[str, Any]) -> None:
        logits = torch.randn(3, 50, generator=torch.manual_seed(8))
        clean = draw(logits, [row(50, **params)] * 3)
        logits[1, 17] = value
        got = draw(logits, [row(50, **params)] * 3)
        assert [d.bad for d in got] == [False, True, False]
        assert 0 <= got[1].token_id < 50
        assert got[1].logprob is None
        assert (got[0], got[2]) == (clean[0], clean[2])

    def test_a_row_with_nothing_left_to_draw_is_flagged(self) -> None:
        assert draw(torch.full((1, 4), -math.inf), [row(4)])[0].bad
        assert draw(torch.zeros(1, 2), [row(2, min_tokens=3, end_ids=(0, 1))])[0].bad

    def test_masked_ids_are_fine(self) -> None:
        assert not draw(torch.tensor([[0.0, -math.inf]]), [row(2)])[0].bad


class TestLogprobs:
    def test_are_the_raw_models(self) -> None:
        logits = torch.randn(1, 30, generator=torch.manual_seed(9)) * 2
        exact = logits[0].log_softmax(-1)
        got = draw(logits, [row(30, temperature=0.5, top_k=3, logit_bias=((7, 100.0),), logprobs=4)])[0]
        assert got.logprob is not None
        assert (got.token_id, got.logprob.token_id) == (7, 7)
        assert got.logprob.logprob == pytest.approx(exact[7].item())
        values, ids = exact.topk(4)
        assert [token for token, _ in got.logprob.top] == ids.tolist()
        assert [value for _, value in got.logprob.top] == pytest.approx(values.tolist())

    def test_each_row_gets_what_it_asked_for(self) -> None:
        logits = torch.randn(4, 30, generator=torch.manual_seed(10))
        rows = [row(30), row(30, logprobs=0), row(30, logprobs=20), row(30, logprobs=3)]
        got = [d.logprob for d in draw(logits, rows)]
        assert [None if g is None else len(g.top) for g in got] == [None, 0, 20, 3]

    def test_zero_alone(self) -> None:
        got = draw(torch.zeros(1, 4), [row(4, logprobs=0)])[0].logprob
        assert got is not None
        assert got.top == ()
        assert got.logprob == pytest.approx(-math.log(4))

    def test_ties_go_to_the_lowest_ids_and_masked_ids_are_left_out(self) -> None:
        got = draw(torch.tensor([[1.0, 1.0, 1.0, 1.0]]), [row(4, logprobs=2)])[0].logprob
        assert got is not None
        assert [token for token, _ in got.top] == [0, 1]
        got = draw(torch.tensor([[1.0, -math.inf, 0.0]]), [row(3, logprobs=3)])[0].logprob
        assert got is not None
        assert [token for token, _ in got.top] == [0, 2]


class TestRefusals:
    @pytest.mark.parametrize(
        ("params", "says"),
        [
            ({"temperature": -1.0}, "temperature must be 0 or more and finite, got -1.0"),
            ({"temperature": math.nan}, "temperature"),
            ({"top_p": 0.0}, "top_p must be over 0"),
            ({"top_k": -1}, "top_k"),
            ({"min_p": 1.5}, "min_p"),
            ({"repetition_penalty": 0.0}, "repetition_penalty"),
            ({"frequency_penalty": math.inf}, "frequency_penalty"),
            ({"presence_penalty": math.nan}, "presence_penalty"),
            ({"logprobs": 11}, "logprobs must be 0 to 10, got 11"),
            ({"logit_bias": ((10, 1.0),)}, "token 10, but the model's ids are 0 to 9"),
            ({"logit_bias": ((1, math.inf),)}, "logit_bias of token 1 must be finite"),
        ],
    )
    def test_a_row_out_of_range_is_refused_alone(self, params: dict[str, Any], says: str) -> None:
        with pytest.raises(ValueError, match=says):
            row(10, **params)

    def test_shapes_must_match_the_batch(self) -> None:
        batch = SamplingBatch.build([row(10)] * 2, vocab_size=10)
        with pytest.raises(ValueError, match="the batch is 2 rows of 10 ids"):
            sample(torch.zeros(2, 11), batch, [0, 0])
        with pytest.raises(ValueError, match="1 positions"):
            sample(torch.zeros(2, 10), batch, [0])

    def test_a_vocabulary_over_the_integers_range_is_refused(self) -> None:
        with pytest.raises(ValueError, match=str(MAX_VOCAB)):
            SamplingBatch.build([], vocab_size=MAX_VOCAB + 1)
