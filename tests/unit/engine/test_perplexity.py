"""Perplexity: windows score each token once, and the engine's sum is that of transformers' own loss."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from deployments.engine import loader
from deployments.engine.load_probe import Plain
from deployments.engine.loader import LoadedModel, load
from deployments.engine.perplexity import Score, Window, score, windows
from placement.plan import Plan
from tests.unit.engine import tiny

TEXT = [random.Random(4).randrange(tiny.VOCAB) for _ in range(83)]


@pytest.mark.parametrize(
    ("tokens", "window", "stride"), [(100, 16, 5), (100, 16, 8), (17, 16, 1), (9, 16, 8), (2, 2, 1)]
)
def test_overlapping_windows_score_every_token_but_the_first_once(tokens: int, window: int, stride: int) -> None:
    found = list(windows(tokens, window, stride))
    assert [token for each in found for token in range(each.first, each.end)] == list(range(1, tokens))
    assert all(each.end - each.begin <= window for each in found)
    assert all(each.first - each.begin >= window - stride for each in found[1:])


def test_disjoint_windows_leave_out_the_first_token_of_each() -> None:
    assert list(windows(21, 10, 10)) == [Window(0, 1, 10), Window(10, 11, 20)]


@pytest.mark.parametrize(("tokens", "window", "stride"), [(1, 8, 4), (8, 1, 1), (8, 4, 0), (8, 4, 5)])
def test_windows_that_score_nothing_or_skip_are_refused(tokens: int, window: int, stride: int) -> None:
    with pytest.raises(ValueError, match="no windows"):
        list(windows(tokens, window, stride))


def own_loss(model: PreTrainedModel, window: int, stride: int) -> Score:
    """As the page of transformers on perplexity computes it, from the losses that its models return."""
    nats, tokens, before = 0.0, 0, 0
    for begin in range(0, len(TEXT), stride):
        end = min(begin + window, len(TEXT))
        ids = torch.tensor([TEXT[begin:end]])
        labels = ids.clone()
        labels[:, : before - end] = -100
        counted = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            loss = float(model(ids, labels=labels).loss) if counted else 0.0
        nats, tokens, before = nats + loss * counted, tokens + counted, end
        if end == len(TEXT):
            break
    return Score(nats, tokens)


def loaded(
    folder: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch, window: int, stride: int
) -> tuple[LoadedModel, Score]:
    """The model in stages, and what transformers' own forward of the same weights scores before they are cut."""
    own = []
    plain = loader.plain_prompt

    def scored_first(model: PreTrainedModel, *rest: Any) -> Plain:
        own.append(own_loss(model, window, stride))
        return plain(model, *rest)

    monkeypatch.setattr(loader, "plain_prompt", scored_first)
    model = load(folder, plan, device_type="cpu")
    return model, own[0]


@pytest.mark.parametrize(
    ("quantization", "stages", "window", "stride"),
    [("nf4", 1, 32, 12), ("nf4", 2, 32, 32), ("int8", 1, 20, 20), ("fp32", 2, 100, 50)],
)
def test_the_engine_scores_what_transformers_own_loss_does(
    quantization: str, stages: int, window: int, stride: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.save(tmp_path, tiny.llama(layers=3))
    plan = tiny.plan_of(folder, stages=stages, quantization=quantization)
    model, own = loaded(folder, plan, monkeypatch, window, stride)
    found = score(model.stages, TEXT, window=window, stride=stride, block_size=plan.block_size, rows=7)
    assert found.tokens == own.tokens
    assert found.nats == pytest.approx(own.nats, rel=1e-5)
    assert found.perplexity == pytest.approx(own.perplexity, rel=1e-4)
    assert found.perplexity > 10, "a model that knew the text would show little"


def test_steps_of_any_size_score_the_same(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path, tiny.llama())
    plan = tiny.plan_of(folder, quantization="fp32")
    stages = load(folder, plan, device_type="cpu").stages
    sums = [score(stages, TEXT, window=40, stride=20, block_size=4, rows=rows).nats for rows in (1, 8, 64)]
    assert sums == pytest.approx([sums[0]] * 3, rel=1e-5)


def test_perplexity_beyond_a_float_is_infinite() -> None:
    assert Score(1e6, 2).perplexity == math.inf
    assert math.isnan(Score(math.nan, 2).perplexity)
    assert Score(2 * math.log(3), 2).perplexity == pytest.approx(3)
