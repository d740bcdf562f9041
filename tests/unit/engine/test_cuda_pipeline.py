"""How large chunks are measured to be, by a lane whose times are given; the pipeline itself is tests/gpu's."""

from __future__ import annotations

import pytest

from deployments.engine.attention import RowSpan
from deployments.engine.budget import CHUNK_SLOWDOWN, LEAST_CHUNK
from deployments.engine.cuda_pipeline import measure_chunks, stage_times
from deployments.engine.forms import Form, forms, mixed
from deployments.engine.stages import StepRows

SIZES = {"block_size": 16, "max_batch_tokens": 2048, "max_sequences": 256, "max_context": 4096}


class Clock:
    """A lane: steps take as long as `fixed_ms`, `row_ms` for each row and `token_ms` for each token of KV say."""

    def __init__(
        self,
        *,
        tokens: int = 2048,
        sequences: int = 256,
        fixed_ms: float,
        row_ms: float,
        token_ms: float = 0.0,
        blocks: int = 0,
        lanes: int = 1,
        last: bool = False,
    ) -> None:
        self.last = last
        self.forms = forms(max_batch_tokens=tokens, max_sequences=sequences, lanes=lanes)
        self.mixed = mixed(max_batch_tokens=tokens, max_sequences=sequences, lanes=lanes, beyond=True)
        self.timed_blocks = blocks
        self.timed: list[Form] = []
        self.spans: list[RowSpan] = []
        self._fixed_ms, self._row_ms, self._token_ms = fixed_ms, row_ms, token_ms

    def head_microseconds(self, rows: int) -> int:
        return 10 * rows * self.last

    def microseconds(self, form: Form, spans: tuple[RowSpan, ...] = ()) -> int:
        self.timed.append(form)
        self.spans += spans
        tokens = sum(span.start + span.count for span in spans)
        return round(1e3 * (self._fixed_ms + self._row_ms * form.rows + self._token_ms * tokens))


def test_more_decodes_leave_time_for_larger_chunks(caplog: pytest.LogCaptureFixture) -> None:
    """64 decodes take 4.25 ms, 224 9.05: steps of 10.6 and 22.6 ms, which are 276 and 676 rows."""
    lane = Clock(fixed_ms=2.33, row_ms=0.03)
    with caplog.at_level("INFO"):
        chunks = measure_chunks(lane, **SIZES)
    rows = {64: 256, 80: 256, 96: 320, 112: 384, 128: 384, 160: 512, 192: 512, 224: 640}
    assert {count: chunks.beside(count, 0) for count in rows} == {
        count: max(256, rows[count] - count) for count in rows
    }
    assert chunks.beside(113, 10**6) == 384 - 113, "no blocks to time"
    decodes, with_chunks = lane.timed[:8], lane.timed[8:]
    assert [form.rows for form in decodes] == [64, 80, 96, 112, 128, 160, 192, 224]
    assert all(form.sequences is None for form in decodes)
    assert [form.rows for form in with_chunks] == [64, 128, 192, 256, 320, 384, 512, 640, 768], (
        "768 is too slow for all"
    )
    assert "64: 4.2 ms, 256; 80: 4.7 ms, 256;" in caplog.text
    assert "224: 9.1 ms, 416\n" in caplog.text
    assert caplog.text.rstrip().endswith("0.0 ns more for each token of the contexts that it decodes")


def test_steps_beyond_the_graphs_are_timed_where_decodes_leave_time_for_them() -> None:
    lane = Clock(fixed_ms=8.0, row_ms=0.025)
    chunks = measure_chunks(lane, **SIZES)
    assert chunks.beside(224, 0) == 1024 - 224  # 13.6 ms, so 34
    assert [form.rows for form in lane.timed if form.rows > 768] == [896, 1024, 1280]


def test_long_contexts_leave_time_for_larger_chunks(caplog: pytest.LogCaptureFixture) -> None:
    """Where all blocks are read, 320,000 tokens, the KV takes 10.2 ms: steps may take 2.5 times 9.1 and 1.5 times
    these, 37.9 ms, which 1,185 rows do."""
    lane = Clock(fixed_ms=2.33, row_ms=0.03, token_ms=32e-6, blocks=20_000)
    with caplog.at_level("INFO"):
        chunks = measure_chunks(lane, **SIZES)
    assert chunks.kv_token_ps == pytest.approx(32_000, rel=1e-3)
    assert chunks.beside(128, 0) == 384 - 128
    assert chunks.beside(128, 128 * 2100) == 768 - 128  # 25.4 of 28.3 ms
    assert max(form.rows for form in lane.timed) == 1280, "the first that is too slow beside any"
    assert caplog.text.rstrip().endswith("32.0 ns more for each token of the contexts that it decodes")


@pytest.mark.parametrize(
    ("blocks", "max_context", "sequences", "length"),
    [
        (20_000, 4096, 64, 4096),  # all that a sequence may have
        (20_000, 100_000, 64, 312 * 16),  # all blocks
        (20_000, 100, 64, 96),
        (64, 4096, 64, 16),
        (63, 4096, 64, None),
        (20_000, 15, 64, None),
        (1000, 4096, 3, 4096),
    ],
)
def test_contexts_that_are_timed_have_blocks_of_their_own(
    blocks: int, max_context: int, sequences: int, length: int | None
) -> None:
    lane = Clock(fixed_ms=2.33, row_ms=0.03, token_ms=0.001, blocks=blocks)
    chunks = measure_chunks(lane, **SIZES | {"max_sequences": sequences, "max_context": max_context})
    assert [span.start + span.count for span in lane.spans] == ([] if length is None else [length] * sequences)
    named = [block for span in lane.spans for block in span.block_table]
    assert all(span.count == 1 and len(span.block_table) * 16 == span.start + 1 for span in lane.spans)
    assert len(set(named)) == len(named) <= blocks
    assert not named or 0 <= min(named) <= max(named) < blocks
    assert chunks.kv_token_ps == pytest.approx(0 if length is None else 10**6, rel=0.01)


def test_a_context_that_costs_nothing_has_no_time_below_zero() -> None:
    lane = Clock(fixed_ms=2.33, row_ms=0.03, token_ms=-1e-6, blocks=20_000)
    assert measure_chunks(lane, **SIZES).kv_token_ps == 0


def test_one_sequence_at_a_time_has_a_chunk_too() -> None:
    lane = Clock(tokens=32, sequences=1, fixed_ms=2.0, row_ms=0.1)
    chunks = measure_chunks(lane, **SIZES | {"max_batch_tokens": 32, "max_sequences": 1})
    assert chunks.beside(1, 1) == 32
    assert lane.timed == [Form(1)]


@pytest.mark.parametrize("kv_tokens", [0, 5000, 200_000])
@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize(("fixed_ms", "row_ms"), [(2.33, 0.03), (4.0, 0.03), (8.0, 0.025), (8.0, 0.016)])
def test_whatever_decodes_a_step_with_a_chunk_keeps_to_the_limit(
    lanes: int, fixed_ms: float, row_ms: float, kv_tokens: int
) -> None:
    """As it is run: in the graph that it fits, beside as many decodes as they are padded to."""
    lane = Clock(fixed_ms=fixed_ms, row_ms=row_ms, token_ms=32e-6, blocks=20_000, lanes=lanes)
    chunks = measure_chunks(lane, **SIZES)
    kv_ms = 32e-6 * kv_tokens
    graphs = forms(max_batch_tokens=2048, max_sequences=256, lanes=lanes)
    for decodes in range(64, 225):
        chunk = chunks.beside(decodes, kv_tokens)
        if chunk == LEAST_CHUNK:
            continue
        step, alone = rows_of(decodes, chunk), rows_of(decodes, 0)
        graph = next((form.rows for form in graphs if form.fits(step)), decodes + chunk)
        usual = next(form.rows for form in graphs if form.fits(alone))
        assert lanes == 1 or graph in {form.rows for form in graphs}, "several GPUs have graphs for all"
        assert fixed_ms + row_ms * graph + kv_ms <= CHUNK_SLOWDOWN * (fixed_ms + row_ms * usual + kv_ms) + 0.01


def rows_of(decodes: int, chunk: int) -> StepRows:
    counts = [1] * decodes + [chunk] * (chunk > 0)
    spans = tuple(RowSpan(0, count, (0,)) for count in counts)
    positions = tuple(p for count in counts for p in range(count))
    return StepRows((0,) * sum(counts), positions, spans, tuple(range(decodes)))


def test_stages_are_timed_by_the_graph_that_a_step_fits() -> None:
    """60 decodes run as 64; of more than there may be, the most are timed. The last has the head."""
    lanes = [Clock(sequences=200, fixed_ms=ms, row_ms=0.01, last=ms == 2.0) for ms in (1.0, 2.0)]
    assert stage_times(lanes, 60) == (1640, 2640 + 640)
    assert stage_times(lanes, 4096) == (3000, 4000 + 2000)
