"""Steps that are run before the first request, and that a pipeline runs as many as it can have in flight."""

from __future__ import annotations

import pytest

from benchmarks.no_cuda import no_cuda, open_pipeline
from deployments.engine.cuda_pipeline import CudaPipeline
from deployments.engine.draw import Draw
from deployments.engine.flight import Flight
from deployments.engine.rehearsal import rehearsed
from deployments.engine.stages import StepRows

SIZES = {"block_size": 4, "scratch": 99, "vocab": 64}


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
    ids = second[0].ids
    assert ids[:drawn] == tuple(range(-1, -1 - drawn, -1))
    assert min(ids[drawn:], default=0) == 0
    assert not second[1].plain


@pytest.mark.parametrize("slots", [1, 3])
def test_a_pipeline_has_run_as_many_steps_as_it_can_have_in_flight(slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[tuple[int, int] | str] = []
    launch, result = CudaPipeline.launch, Flight.result

    def launched(self: CudaPipeline, slot: int, step: StepRows, draw: Draw) -> Flight:
        order.append((slot, len(step.ids)))
        return launch(self, slot, step, draw)

    def read(self: Flight) -> object:
        order.append("read")
        return result(self)

    monkeypatch.setattr(CudaPipeline, "launch", launched)
    monkeypatch.setattr(Flight, "result", read)
    with no_cuda():
        open_pipeline(slots, max_sequences=8, max_batch_tokens=70, blocks=5, block_size=4, vocab=300, max_context=20)
    assert order == [(slot, 70) for slot in range(slots)] * 2 + ["read"] * 2 * slots
