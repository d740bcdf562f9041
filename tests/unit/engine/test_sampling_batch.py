"""Parameters of rows: what is refused, which rows are worked on together, and how they reach the device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from deployments.engine.sampling_batch import Group, Row, SamplingBatch
from deployments.engine.upload import upload
from deployments.protocol import Sampling
from placement.reserve import SAMPLE_ROWS

CPU = torch.device("cpu")


def row(vocab_size: int = 10, **params: Any) -> Row:
    return Row(Sampling(**{"max_tokens": 100, "seed": 7, **params}), 3, vocab_size)


def groups(*rows: Row, vocab_size: int = 10) -> tuple[Group, ...]:
    return SamplingBatch.build(rows, vocab_size=vocab_size, device=CPU).groups


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
            row(**params)


class TestGroups:
    def test_plain_greedy_rows_are_in_none(self) -> None:
        batch = SamplingBatch.build([row(temperature=0.0), row(top_k=1)], vocab_size=10, device=CPU)
        assert batch == SamplingBatch((), ())

    def test_a_group_holds_only_what_its_rows_need(self) -> None:
        (group,) = groups(row(), row())
        assert (group.penalties, group.bias, group.ends) == (None, None, ())
        assert group.chance is not None
        assert (group.chance.trim, group.chance.min_weights) == (None, None)

    def test_greedy_and_drawn_rows_are_apart_and_trimmed_ones_come_first(self) -> None:
        shaped, drawn = groups(
            row(),
            row(temperature=0.0, frequency_penalty=1.0),
            row(top_k=4),
            row(temperature=0.0),
            row(top_p=0.5),
        )
        assert (shaped.members, shaped.chance, shaped.keys) == ((1,), None, ())
        assert drawn.members == (2, 4, 0)
        assert drawn.chance is not None
        assert drawn.chance.trim is not None
        assert drawn.chance.trim.top_k is not None
        assert drawn.chance.trim.top_k.tolist() == [4, 10]

    def test_top_k_over_the_vocabulary_is_off(self) -> None:
        (group,) = groups(row(top_k=1000))
        assert group.chance is not None
        assert group.chance.trim is None

    def test_no_group_has_more_rows_than_the_plan_reserves_for(self) -> None:
        made = groups(*[row() for _ in range(2 * SAMPLE_ROWS + 1)])
        assert [len(group.members) for group in made] == [SAMPLE_ROWS, SAMPLE_ROWS, 1]

    def test_on_the_cpu_large_vocabularies_go_in_smaller_groups(self) -> None:
        made = groups(*[row(vocab_size=30_000) for _ in range(5)], vocab_size=30_000)
        assert [len(group.members) for group in made] == [2, 2, 1]

    def test_end_ids_and_biases_point_into_the_groups_own_scores(self) -> None:
        (group,) = groups(row(temperature=0.0), row(end_ids=(4, 99), min_tokens=2), row(logit_bias=((5, 1.5),)))
        assert group.members == (1, 2)
        assert group.ends == ((1, 2, 4),)
        assert group.bias is not None
        assert (group.bias.at.tolist(), group.bias.values.tolist()) == ([256 + 5], [1.5])

    def test_log_probabilities_are_grouped_apart(self) -> None:
        rows = [row(temperature=0.0), row(temperature=0.0, logprobs=0), row(logprobs=3)]
        (wanted,) = SamplingBatch.build(rows, vocab_size=10, device=CPU).wanted
        assert (wanted.members, wanted.top, wanted.rows.tolist()) == ((1, 2), (0, 3), [1, 2])


@dataclass(frozen=True)
class _Inner:
    flag: Tensor | None
    small: Tensor


@dataclass(frozen=True)
class _Outer:
    name: str
    long: Tensor
    inner: _Inner | None
    last: Tensor


class TestUpload:
    def test_every_tensor_arrives_as_it_was(self) -> None:
        inner = _Inner(None, torch.tensor([1.5, -2.0, 3.0]))
        sent = _Outer("a", torch.arange(6).view(2, 3).t(), inner, torch.tensor([True, False]))
        got = upload(sent, CPU)
        assert got.name == "a"
        assert got.inner is not None
        assert got.inner.flag is None
        for there, here in ((got.long, sent.long), (got.inner.small, inner.small), (got.last, sent.last)):
            assert (there.dtype, there.shape) == (here.dtype, here.shape)
            assert torch.equal(there, here)

    def test_is_one_copy_of_its_own(self) -> None:
        sent = _Outer("a", torch.arange(3), None, torch.arange(5))
        got = upload(sent, CPU)
        assert got.long.untyped_storage().data_ptr() == got.last.untyped_storage().data_ptr()
        sent.long.zero_()
        assert got.long.tolist() == [0, 1, 2]

    def test_nothing_to_send(self) -> None:
        assert upload(_Inner(None, torch.empty(0)), CPU).small.shape == (0,)
