"""How large chunks are measured to be, by a lane whose times are given; the pipeline itself is tests/gpu's."""

from __future__ import annotations

import pytest

from deployments.engine.attention import RowSpan
from deployments.engine.budget import CHUNK_SLOWDOWN, LEAST_CHUNK
from deployments.engine.cuda_pipeline import measure_chunks
from deployments.engine.lane import Form, forms, mixed
from deployments.engine.stages import StepRows


class Clock:
    """A lane: steps take as long as `fixed_ms` and `row_ms` for each row say."""

    def __init__(self, *, tokens: int, sequences: int, fixed_ms: float, row_ms: float, lanes: int = 1) -> None:
        self.mixed = mixed(max_batch_tokens=tokens, max_sequences=sequences, lanes=lanes, beyond=True)
        self.timed: list[Form] = []
        self._fixed_ms, self._row_ms = fixed_ms, row_ms

    def milliseconds(self, form: Form) -> float:
        self.timed.append(form)
        return self._fixed_ms + self._row_ms * form.rows


def test_more_decodes_leave_time_for_larger_chunks(caplog: pytest.LogCaptureFixture) -> None:
    """64 decodes take 4.25 ms, 224 9.05: steps of 10.6 and 22.6 ms, which are 276 and 676 rows."""
    lane = Clock(tokens=2048, sequences=256, fixed_ms=2.33, row_ms=0.03)
    with caplog.at_level("INFO"):
        chunks = measure_chunks(lane, max_batch_tokens=2048, max_sequences=256)
    rows = {64: 256, 80: 256, 96: 320, 112: 384, 128: 384, 160: 512, 192: 512, 224: 640}
    assert chunks.entries == tuple(rows.items())
    assert [chunks.beside(count) for count in (64, 112, 113)] == [256, 384 - 112, 384 - 113], "256 is the least"
    decodes, with_chunks = lane.timed[:8], lane.timed[8:]
    assert [form.rows for form in decodes] == [64, 80, 96, 112, 128, 160, 192, 224]
    assert all(form.sequences is None for form in decodes)
    assert [form.rows for form in with_chunks] == [64, 128, 192, 256, 320, 384, 512, 640, 768], (
        "768 is too slow for all"
    )
    assert "64: 4.2 ms, 256; 80: 4.7 ms, 256;" in caplog.text
    assert caplog.text.rstrip().endswith("224: 9.1 ms, 416")


def test_steps_beyond_the_graphs_are_timed_where_decodes_leave_time_for_them() -> None:
    lane = Clock(tokens=2048, sequences=256, fixed_ms=8.0, row_ms=0.025)
    chunks = measure_chunks(lane, max_batch_tokens=2048, max_sequences=256)
    assert chunks.beside(224) == 1024 - 224  # 13.6 ms, so 34
    assert [form.rows for form in lane.timed if form.rows > 768] == [896, 1024, 1280]


def test_one_sequence_at_a_time_has_a_table_too() -> None:
    lane = Clock(tokens=32, sequences=1, fixed_ms=2.0, row_ms=0.1)
    assert measure_chunks(lane, max_batch_tokens=32, max_sequences=1).beside(1) == 32
    assert lane.timed == [Form(1)]


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize(("fixed_ms", "row_ms"), [(2.33, 0.03), (4.0, 0.03), (8.0, 0.025), (8.0, 0.016)])
def test_whatever_decodes_a_step_with_a_chunk_keeps_to_the_limit(lanes: int, fixed_ms: float, row_ms: float) -> None:
    """As it is run: in the graph that it fits, beside as many decodes as they are padded to."""
    lane = Clock(tokens=2048, sequences=256, fixed_ms=fixed_ms, row_ms=row_ms, lanes=lanes)
    chunks = measure_chunks(lane, max_batch_tokens=2048, max_sequences=256)
    graphs = forms(max_batch_tokens=2048, max_sequences=256, lanes=lanes)
    for decodes in range(64, 225):
        chunk = chunks.beside(decodes)
        if chunk == LEAST_CHUNK:
            continue
        step, alone = rows_of(decodes, chunk), rows_of(decodes, 0)
        graph = next((form.rows for form in graphs if form.fits(step)), decodes + chunk)
        usual = next(form.rows for form in graphs if form.fits(alone))
        assert lanes == 1 or graph in {form.rows for form in graphs}, "several GPUs have graphs for all"
        assert fixed_ms + row_ms * graph <= CHUNK_SLOWDOWN * (fixed_ms + row_ms * usual)


def rows_of(decodes: int, chunk: int) -> StepRows:
    counts = [1] * decodes + [chunk] * (chunk > 0)
    spans = tuple(RowSpan(0, count, (0,)) for count in counts)
    positions = tuple(p for count in counts for p in range(count))
    return StepRows((0,) * sum(counts), positions, spans, tuple(range(decodes)))
