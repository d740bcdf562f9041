"""The sampler of a device: whole draws, the history behind penalties, and what it keeps between steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from deployments.engine.draw import Draw
from deployments.engine.sampler import SCRATCH_BYTES, Sampler
from deployments.engine.sampling import SampledToken, weight_table
from deployments.engine.sampling_batch import MAX_VOCAB, Row, SamplingBatch, padded
from tests.unit.engine.drawing import BLOCK, Request, draw_requests, make_draw, note, request, tokens
from tests.unit.engine.memory import PeakBytes

CPU = torch.device("cpu")


def sampler(vocab_size: int, blocks: int = 8) -> Sampler:
    return Sampler(CPU, vocab_size=vocab_size, num_blocks=blocks, block_size=BLOCK)


def drawn(logits: Tensor, *requests: Request) -> list[int]:
    return [token.token_id for token in tokens(logits, list(requests))]


class TestGreedy:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_is_argmax(self, dtype: torch.dtype) -> None:
        logits = torch.randn(5, 1000, generator=torch.manual_seed(0)).to(dtype)
        assert drawn(logits, *[request(temperature=0.0)] * 5) == logits.float().argmax(-1).tolist()

    def test_lowest_id_wins_a_tie(self) -> None:
        logits = torch.tensor([[0.0, 2.0, 1.0, 2.0, 2.0]]).expand(4, -1)
        greedy = [
            request(temperature=0.0),
            request(temperature=1e-9),
            request(top_k=1),
            request(temperature=0.0, logit_bias=((0, 0.5),)),
        ]
        assert drawn(logits, *greedy) == [1, 1, 1, 1]

    def test_greedy_and_drawn_rows_share_a_step(self) -> None:
        logits = torch.full((4, 40), -math.inf)
        logits[range(4), [3, 30, 7, 19]] = 0.0
        mixed = [request(), request(temperature=0.0), request(top_p=0.5), request(logit_bias=((1, 1.0),))]
        assert drawn(logits, *mixed) == [3, 30, 7, 19]

    def test_a_step_without_sampled_rows_draws_nothing(self) -> None:
        assert tokens(torch.empty(0, 10), []) == []

    def test_a_tiny_temperature_does_not_overflow(self) -> None:
        got = tokens(torch.tensor([[1e30, 3e38, -3e38]]), [request(temperature=2e-5)])
        assert got == [SampledToken(1, False, None)]

    def test_the_callers_logits_are_left_as_they_were(self) -> None:
        logits = torch.randn(1, 60, generator=torch.manual_seed(5))
        before = logits.clone()
        tokens(logits, [request([1], [2], repetition_penalty=2.0, logit_bias=((3, 9.0),), top_k=5, logprobs=3)])
        assert torch.equal(logits, before)


class TestHistory:
    prompt, output = [5, 9, 9, 2, 40], [9, 11, 11, 11, 3]
    logits = torch.randn(1, 60, generator=torch.manual_seed(5)) * 3

    def likeliest(self, **params: Any) -> int:
        return drawn(self.logits, request(self.prompt, self.output, temperature=0.0, **params))[0]

    @pytest.mark.parametrize("token", [5, 40, 11, 3])
    def test_repetition_is_over_prompt_and_output(self, token: int) -> None:
        bias = ((token, 50.0),)
        assert self.likeliest(logit_bias=bias) == token
        logits = self.logits.clone()
        logits[0, token] = 50.0
        assert drawn(logits, request(self.prompt, self.output, temperature=0.0, repetition_penalty=1e6)) != [token]

    def test_frequency_is_over_the_output_alone(self) -> None:
        logits = torch.zeros(1, 60)
        logits[0, [2, 11]] = torch.tensor([5.0, 7.0])
        penalised = request(self.prompt, self.output, temperature=0.0, frequency_penalty=1.0)
        assert drawn(logits, penalised) == [2]  # 11 came up three times; 2 is of the prompt

    def test_each_row_reads_its_own_blocks(self) -> None:
        logits = torch.zeros(3, 60)
        rows = [request([], [i] * (6 + 9 * i), temperature=0.0, presence_penalty=1.0) for i in range(3)]
        assert drawn(logits, *rows) == [1, 0, 0]

    def test_ids_behind_the_last_token_do_not_count(self) -> None:
        """The blocks held other requests before, and their ids are still there."""
        made = sampler(60)
        made.note_inputs(torch.full((4,), 7), torch.arange(4))
        one = request([], [1, 2], temperature=0.0, presence_penalty=1.0)
        draw = make_draw([one], [one.row(60)])
        note(made, [one], draw)
        logits = torch.zeros(1, 60)
        logits[0, [2, 7]] = torch.tensor([0.9, 0.5])
        assert made.draw(logits, draw).read()[0].token_id == 7

    def test_many_long_histories_are_read_in_parts(self) -> None:
        """A vocabulary of 5 bounds what is read at once to 80 tokens: two rows here."""
        rows = [request([], [i] * 37, temperature=0.0, frequency_penalty=0.01) for i in range(5)]
        logits = torch.eye(5) * 0.3
        assert drawn(logits, *rows) == [1, 0, 0, 0, 0]

    def test_grows_step_by_step(self) -> None:
        """The last token drawn is fed as an input of the next step, and penalised from there on."""
        made = sampler(6)
        row = request([5], temperature=0.0, presence_penalty=1.0).row(6)
        logits = torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.5, 0.4]])
        got: list[int] = []
        for position in range(6):
            slot = (3, 1)[position // BLOCK] * BLOCK + position % BLOCK
            made.note_inputs(torch.tensor(got[-1:] or [5]), torch.tensor([slot]))
            table = (3, 1)[: position // BLOCK + 1]
            got.append(made.draw(logits, Draw((row,), (position + 1,), (table,))).read()[0].token_id)
        assert got == [0, 1, 2, 3, 4, 5]


class TestBiasAndMinTokens:
    def test_bias_decides(self) -> None:
        logits = torch.randn(1, 20, generator=torch.manual_seed(6))
        assert drawn(logits, request(logit_bias=((13, 100.0),))) == [13]

    def test_end_ids_are_masked_until_min_tokens(self) -> None:
        logits = torch.zeros(1, 6)
        logits[0, [4, 5]] = torch.tensor([9.0, 8.0])
        params = {"temperature": 0.0, "min_tokens": 2, "end_ids": (4, 5, 99)}
        assert [drawn(logits, request([0] * 3, [0] * n, **params)) for n in range(4)] == [[0], [0], [4], [4]]


class TestBadLogits:
    @pytest.mark.parametrize("params", [{"temperature": 0.0}, {}, {"top_p": 0.5}, {"min_p": 0.2}, {"logprobs": 2}])
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_only_the_row_at_fault_is_flagged(self, value: float, params: dict[str, Any]) -> None:
        logits = torch.randn(3, 50, generator=torch.manual_seed(8))
        clean = tokens(logits, [request(**params)] * 3)
        logits[1, 17] = value
        step = draw_requests(logits, [request(**params)] * 3)
        got = step.read()
        assert [token.bad for token in got] == [False, True, False]
        assert 0 <= step.ids[1] < 50
        assert got[1].logprob is None
        assert (got[0], got[2]) == (clean[0], clean[2])

    def test_a_row_with_nothing_left_to_draw_is_flagged(self) -> None:
        assert tokens(torch.full((1, 4), -math.inf), [request()])[0].bad
        assert tokens(torch.zeros(1, 2), [request(min_tokens=3, end_ids=(0, 1))])[0].bad
        assert tokens(torch.zeros(1, 2), [request(temperature=0.0, min_tokens=3, end_ids=(0, 1))])[0].bad

    def test_masked_ids_are_fine(self) -> None:
        assert not tokens(torch.tensor([[0.0, -math.inf]]), [request()])[0].bad


class TestLogprobs:
    def test_are_the_raw_models(self) -> None:
        logits = torch.randn(1, 30, generator=torch.manual_seed(9)) * 2
        exact = logits[0].log_softmax(-1)
        got = tokens(logits, [request(temperature=0.5, top_k=3, logit_bias=((7, 100.0),), logprobs=4)])[0]
        assert got.logprob is not None
        assert (got.token_id, got.logprob.token_id) == (7, 7)
        assert got.logprob.logprob == pytest.approx(exact[7].item())
        values, ids = exact.topk(4)
        assert [token for token, _ in got.logprob.top] == ids.tolist()
        assert [value for _, value in got.logprob.top] == pytest.approx(values.tolist())

    def test_each_row_gets_what_it_asked_for(self) -> None:
        logits = torch.randn(4, 30, generator=torch.manual_seed(10))
        rows = [request(), request(logprobs=0), request(logprobs=20), request(logprobs=3)]
        got = [token.logprob for token in tokens(logits, rows)]
        assert [None if g is None else len(g.top) for g in got] == [None, 0, 20, 3]

    def test_masked_ids_are_left_out(self) -> None:
        got = tokens(torch.tensor([[1.0, -math.inf, 0.0]]), [request(logprobs=3)])[0].logprob
        assert got is not None
        assert [token for token, _ in got.top] == [0, 2]


class TestKept:
    def test_parameters_are_laid_out_once_for_equal_rows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        built: list[int] = []
        build = SamplingBatch.build

        def counted(rows: Sequence[Row], **where: Any) -> SamplingBatch:
            built.append(len(rows))
            return build(rows, **where)

        monkeypatch.setattr(SamplingBatch, "build", counted)
        made = sampler(10)
        rows = tuple(request().row(10) for _ in range(2))
        logits = torch.zeros(2, 10)
        for position in range(3):
            made.draw(logits, Draw(rows, (position, position), ((), ())))
        made.draw(logits[:1], Draw(rows[:1], (3,), ((),)))
        assert built == [2, 1]

    def test_a_batch_comes_back_unharmed_after_many_others(self) -> None:
        made = sampler(10)
        rows = [request(seed=i).row(10) for i in range(50)]
        logits = torch.zeros(1, 10)
        first = [made.draw(logits, Draw((row,), (0,), ((),))).read() for row in rows]
        assert [made.draw(logits, Draw((row,), (0,), ((),))).read() for row in rows] == first


class TestScratch:
    @pytest.mark.parametrize(
        "params",
        [
            {"temperature": 0.0, "repetition_penalty": 1.1, "frequency_penalty": 0.2},
            {"top_k": 20, "top_p": 0.95, "min_p": 0.1, "repetition_penalty": 1.1},
            {"top_p": 0.9, "logprobs": 20},
        ],
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_is_within_what_is_stated(self, params: dict[str, Any], dtype: torch.dtype) -> None:
        """Groups of two rows here, and histories as long as are read at once."""
        vocab_size, rows = 30_000, 6
        requests = [request([1] * 9000, [2] * 1000, **params) for _ in range(rows)]
        made = sampler(vocab_size, blocks=rows * 2500)
        draw = make_draw(requests, [one.row(vocab_size) for one in requests])
        logits = torch.randn(rows, vocab_size, generator=torch.manual_seed(11)).to(dtype)
        made.draw(logits, draw)
        with PeakBytes() as used:
            made.draw(logits, draw)
        assert 4 * 2 * vocab_size < used.peak <= SCRATCH_BYTES * 2 * padded(vocab_size)

    def test_plain_greedy_rows_need_none(self) -> None:
        logits = torch.randn(6, 30_000, generator=torch.manual_seed(11))
        with PeakBytes() as used:
            drawn(logits, *[request(temperature=0.0)] * 6)
        assert used.peak < 2 * weight_table().nbytes


class TestLikeliest:
    @pytest.mark.parametrize(
        "params",
        [{"top_k": 0}, {"logprobs": 0}, {"logit_bias": ((1, 2.0),)}, {"min_tokens": 1}, {"presence_penalty": 1.0}],
        ids=str,
    )
    def test_a_row_that_needs_more_needs_logits(self, params: dict[str, Any]) -> None:
        plain = request(temperature=0.0)
        other = request(**({"temperature": 0.0} if "top_k" not in params else {}), **params)
        for asked, alone in (([plain] * 3, True), ([plain, other, plain], False)):
            draw = make_draw(asked, [each.row(10) for each in asked])
            batch = SamplingBatch.build(draw.rows, vocab_size=10, device=CPU)
            assert draw.plain is alone
            assert bool(batch.groups or batch.wanted) is not alone

    def test_what_was_found_elsewhere_is_taken_as_it_is(self) -> None:
        """Ids for the device, and for the host which of them are bad."""
        drawn = sampler(10).take(torch.tensor([[3, 4, 5], [3, -1, 5]]))
        assert drawn.ids.tolist() == [3, 4, 5]
        bad = SampledToken(0, True, None)
        assert drawn.read() == [SampledToken(3, False, None), bad, SampledToken(5, False, None)]

    def test_what_no_draw_leaves_is_no_bad_row(self) -> None:
        with pytest.raises(RuntimeError, match="row 1 of a step drew -7"):
            sampler(10).take(torch.tensor([[3, 4], [3, -7]])).read()


class TestRefusals:
    def test_logits_must_match_the_draw(self) -> None:
        with pytest.raises(ValueError, match=r"1 rows of 10 ids, but logits are \(1, 11\)"):
            sampler(10).draw(torch.zeros(1, 11), make_draw([request()], [request().row(10)]))

    def test_a_vocabulary_over_the_integers_range(self) -> None:
        with pytest.raises(ValueError, match=str(MAX_VOCAB)):
            sampler(MAX_VOCAB + 1)
