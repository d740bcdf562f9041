"""Steps that are run before the first request, and that a pipeline runs as many as it can have in flight."""

from __future__ import annotations

import logging

import pytest

from benchmarks.no_cuda import no_cuda, open_pipeline
from deployments.engine import cuda_pipeline
from deployments.engine.attention import RowSpan
from deployments.engine.attention_flashinfer import FlashInferAttention
from deployments.engine.cuda_pipeline import CudaPipeline
from deployments.engine.draw import Draw
from deployments.engine.flight import Flight
from deployments.engine.rehearsal import rehearsed
from deployments.engine.sampling_batch import Row
from deployments.engine.stages import StepRows
from deployments.protocol import Sampling

SIZES = {"length": 4, "scratch": 99, "vocab": 64}


def check(step: StepRows, draw: Draw, *, rows: int, drawn: int) -> None:
    assert len(step.ids) == len(step.positions) == sum(span.count for span in step.spans) == rows
    assert all(span.block_table == (99,) and span.start + span.count <= 4 for span in step.spans)
    assert {slot // 4 for slot in step.cache_slots(4)} == {99}
    assert len(step.sampled) == len(draw.rows) == len(draw.positions) == len(draw.tables) == drawn
    last_rows = [sum(span.count for span in step.spans[: i + 1]) - 1 for i in range(drawn)]
    assert list(step.sampled) == last_rows
    assert list(draw.positions) == [span.start + span.count for span in step.spans[:drawn]]


@pytest.mark.parametrize(("rows", "sequences", "drawn"), [(30, 3, 3), (30, 99, 8), (1, 1, 1), (2, 8, 1)])
def test_prompts_and_then_what_follows_them(rows: int, sequences: int, drawn: int) -> None:
    first, second = rehearsed(rows=rows, sequences=sequences, **SIZES)
    check(*first, rows=rows, drawn=drawn)
    assert set(first[0].ids) == {0}
    assert first[1].plain
    check(*second, rows=rows, drawn=drawn)
    assert second[0].spans[:drawn] == (RowSpan(3, 1, (99,)),) * drawn
    ids = second[0].ids
    assert ids[:drawn] == tuple(range(-1, -1 - drawn, -1))
    assert min(ids[drawn:], default=0) == 0


@pytest.mark.parametrize("vocab", [3, 64])
def test_the_second_draw_asks_for_all_there_is(vocab: int) -> None:
    _, (_, draw) = rehearsed(rows=30, sequences=3, length=4, scratch=99, vocab=vocab)
    row, usual = draw.rows[0], Sampling(max_tokens=1, seed=0)
    asked, off = row.sampling, Row(usual, 1, vocab)
    assert not row.greedy
    assert row.trimmed
    assert row.penalised
    names = {name for name in Sampling.__slots__ if getattr(asked, name) != getattr(usual, name)}
    assert names == set(Sampling.__slots__) - {"seed", "choice"}
    assert (row.top_k < off.top_k) == (vocab > 40)
    assert asked.logprobs == min(5, vocab)
    assert draw.output_count(0) < asked.min_tokens, "its end token would not be masked"


def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, StepRows, Draw] | str]:
    """What pipelines launch and read from here on."""
    order: list[tuple[int, StepRows, Draw] | str] = []
    launch, result = CudaPipeline.launch, Flight.result

    def noted(self: CudaPipeline, slot: int, step: StepRows, draw: Draw) -> Flight:
        order.append((slot, step, draw))
        return launch(self, slot, step, draw)

    def read(self: Flight) -> object:
        order.append("read")
        return result(self)

    monkeypatch.setattr(CudaPipeline, "launch", noted)
    monkeypatch.setattr(Flight, "result", read)
    return order


@pytest.mark.parametrize("slots", [1, 3])
def test_a_pipeline_has_run_as_many_steps_as_it_can_have_in_flight(
    slots: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    order = launched(monkeypatch)
    with no_cuda(), caplog.at_level(logging.INFO, cuda_pipeline.__name__):
        open_pipeline(slots, max_sequences=8, max_batch_tokens=70, blocks=5, block_size=4, vocab=300, max_context=20)
    steps = [each for each in order if not isinstance(each, str)]
    assert order == steps + ["read"] * 2 * slots
    assert [(slot, len(step.ids), len(draw.rows)) for slot, step, draw in steps] == [
        (slot, 70, 8) for slot in range(slots)
    ] * 2
    assert {span.block_table for _, step, _ in steps for span in step.spans} == {(5,)}
    assert steps[-1][2].rows[0].top_k == 40
    assert f"rehearsed {2 * slots} steps in " in caplog.messages[-1]


def test_no_position_is_beyond_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    order = launched(monkeypatch)
    with no_cuda():
        open_pipeline(1, max_sequences=8, max_batch_tokens=70, blocks=5, block_size=32, vocab=300, max_context=20)
    assert max(max(each[1].positions) for each in order if not isinstance(each, str)) == 19


def test_attention_without_graphs_has_fewer_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    order = launched(monkeypatch)
    monkeypatch.setattr(FlashInferAttention, "capturable", False)
    with no_cuda():
        open_pipeline(1, max_sequences=8, max_batch_tokens=2048, blocks=5, block_size=16, vocab=300, max_context=64)
    assert [len(each[1].ids) for each in order if not isinstance(each, str)] == [256, 256]
