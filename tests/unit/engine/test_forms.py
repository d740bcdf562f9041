"""Which graph runs which step, in plain integers; the graphs themselves are tests/gpu's."""

from __future__ import annotations

from itertools import pairwise

import pytest

from deployments.engine.attention import RowSpan, StepLayout
from deployments.engine.budget import counted_decodes
from deployments.engine.compiled import FEW_ROWS
from deployments.engine.forms import MOST_CAPTURED_ROWS, Form, drawn, few_sizes, forms, large_sizes, mixed, usual
from deployments.engine.stages import StepRows
from placement.workload import CAPTURED_ROWS

SIZES = [(2048, 256), (2048, 200), (512, 512), (256, 16), (100, 3), (64, 1000), (1, 1)]


def step(*counts: int, unsampled: int = 0) -> StepRows:
    """Sequences that compute so many tokens each; all but the last `unsampled` draw their next."""
    spans = tuple(RowSpan(0, count, tuple(range(count))) for count in counts)
    ends = [sum(counts[: i + 1]) - 1 for i in range(len(counts) - unsampled)]
    positions = tuple(p for count in counts for p in range(count))
    return StepRows((0,) * sum(counts), positions, spans, tuple(ends))


def chosen(every: tuple[Form, ...], rows: StepRows) -> Form | None:
    return next((form for form in every if form.fits(rows)), None)


@pytest.mark.parametrize(("tokens", "sequences"), SIZES)
def test_every_step_of_decodes_has_a_graph_that_it_fills(tokens: int, sequences: int) -> None:
    every = forms(max_batch_tokens=tokens, max_sequences=sequences)
    for count in range(1, min(tokens, sequences) + 1):
        form = chosen(every, step(*[1] * count))
        assert form is not None
        assert form.sequences is None
        assert form.rows - count < (form.rows / 2 if count <= 16 else form.rows / 3)


@pytest.mark.parametrize(("tokens", "sequences"), SIZES)
def test_no_graph_is_larger_than_a_step(tokens: int, sequences: int) -> None:
    every = forms(max_batch_tokens=tokens, max_sequences=sequences)
    assert len(set(every)) == len(every)
    assert max(form.rows for form in every) <= tokens
    decodes = [form.rows for form in every if form.sequences is None]
    chunks = [form.rows for form in every if form.sequences is not None]
    assert decodes == sorted(decodes)
    assert decodes[-1] == min(tokens, sequences)
    assert chunks == sorted(chunks)
    assert [form.rows for form in every] == decodes + chunks, "a step of decodes meets the graphs of its kind first"


@pytest.mark.parametrize(("tokens", "sequences"), SIZES)
def test_steps_that_chunks_are_measured_against_have_graphs(tokens: int, sequences: int) -> None:
    every = forms(max_batch_tokens=tokens, max_sequences=sequences)
    assert {Form(count) for count in counted_decodes(min(tokens, sequences))} <= set(every)


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize(("tokens", "sequences"), [*SIZES, (8192, 64), (700, 256)])
def test_steps_with_chunks_are_timed_with_graphs_and_beyond_them(tokens: int, sequences: int, lanes: int) -> None:
    captured = [f for f in forms(max_batch_tokens=tokens, max_sequences=sequences, lanes=lanes) if f.sequences]
    assert mixed(max_batch_tokens=tokens, max_sequences=sequences, lanes=lanes, beyond=False) == tuple(captured)
    found = mixed(max_batch_tokens=tokens, max_sequences=sequences, lanes=lanes, beyond=True)
    assert found[: len(captured)] == tuple(captured)
    rows = [form.rows for form in found]
    assert rows == sorted(set(rows))
    assert max(rows, default=0) <= tokens
    if tokens > MOST_CAPTURED_ROWS:
        assert all(
            after <= 1.5 * before if lanes > 1 else after <= 1.25 * before for before, after in pairwise(rows[7:])
        )
        assert 5 * rows[-1] > 4 * tokens


@pytest.mark.parametrize(("tokens", "sequences"), [*SIZES, (8, 1), (2, 1), (5, 3), (2048, 1), (65, 2)])
def test_layers_are_compiled_for_every_number_of_rows_before_requests_come(tokens: int, sequences: int) -> None:
    found = usual(max_batch_tokens=tokens, max_sequences=sequences)
    assert found[0] == Form(1)
    assert any(1 < form.rows <= FEW_ROWS for form in found) is (tokens > 1)
    assert any(form.rows > FEW_ROWS for form in found) is (tokens > FEW_ROWS)
    for form in found:
        padded = StepLayout((), 16, form.rows, form.sequences, form.decodes).padded(scratch=99)
        assert sum(span.count for span in padded) == form.rows <= tokens
        if form.sequences is not None:
            assert len(padded) == form.sequences
            assert padded[-1].count == 0


def test_several_lanes_have_graphs_of_full_steps() -> None:
    every = forms(max_batch_tokens=3000, max_sequences=64, lanes=2)
    assert [form.rows for form in every if form.rows > MOST_CAPTURED_ROWS] == [1024, 1536, 2048, 3000]
    for counts, rows in (
        ((1,) * 60 + (2940,), 3000),
        ((128,) * 16, 2048),
        ((1500, 700), None),  # more than a fourth would be padding
        ((768, 1), 1024),
        ((1, 1151), 1536),
        ((1, 1150), None),
    ):
        form = chosen(every, step(*counts))
        assert (form and form.rows) == rows


def test_the_plan_reserves_for_the_largest_graph() -> None:
    every = forms(max_batch_tokens=8192, max_sequences=1)
    assert max(form.rows for form in every) == MOST_CAPTURED_ROWS == CAPTURED_ROWS


@pytest.mark.parametrize(
    ("form", "rows", "fits"),
    [
        (Form(8), step(*[1] * 8), True),
        (Form(8), step(*[1] * 9), False),
        (Form(8), step(1, 1, 1, unsampled=1), False),  # a prompt's one-token chunk, in the middle of it
        (Form(8), step(1, 3), False),
        (Form(64, 32, 20), step(*[1] * 29), True),  # a decode of the 29 has no room among the others
        (Form(64, 32, 20), step(*[1] * 30), False),  # two sequences are left to pad it, and one of the decodes'
        (Form(64, 32, 20), step(*[2] * 10), True),
        (Form(64, 32, 20), step(*[2] * 11), False),
        (Form(64, 32, 20), step(1, 1, *[2] * 10), True),
        (Form(64, 32, 20), step(1, 1, 62), True),
        (Form(64, 32, 20), step(1, 1, 63), False),
        (Form(64, 32, 20), step(64, unsampled=1), True),
    ],
)
def test_fits(form: Form, rows: StepRows, fits: bool) -> None:
    assert form.fits(rows) is fits


@pytest.mark.parametrize("counts", [(1, 1, 40), (62,), (64,), (1,) * 29, (1,) * 19, (2,) * 10, (1, *(2,) * 10)])
def test_what_fits_can_be_padded(counts: tuple[int, ...]) -> None:
    """Attention pads decodes, and what comes behind them, each with at least one sequence without rows."""
    form, rows = Form(64, 32, 20), step(*counts)
    assert form.fits(rows)
    padded = form.layout(rows.spans, len(rows.ids), 16).padded(scratch=99)
    assert len(padded) == form.sequences
    assert sum(span.count for span in padded) == form.rows
    assert padded[-1].count == padded[form.decodes - 1].count == 0
    assert all(span.count <= 1 for span in padded[: form.decodes])
    assert [span for span in padded if span.count][: len(counts)] == list(rows.spans)


@pytest.mark.parametrize(("tokens", "sequences"), SIZES)
def test_a_chunk_beside_all_decodes_has_a_graph(tokens: int, sequences: int) -> None:
    every = forms(max_batch_tokens=tokens, max_sequences=sequences)
    for chunk in (64, 256):
        rows = step(*[1] * sequences, chunk)
        if len(rows.ids) <= every[-1].rows:
            assert chosen(every, rows) is not None


def test_the_smallest_graph_is_taken() -> None:
    every = forms(max_batch_tokens=2048, max_sequences=256)
    assert chosen(every, step(*[1] * 9)) == Form(16)
    assert chosen(every, step(*[1] * 64)) == Form(64)
    assert chosen(every, step(1, 1, 100)) == Form(128, 97, 65)
    assert chosen(every, step(*[1] * 70, 2)) == Form(128, 97, 65), "six of the decodes go with the others"
    assert chosen(every, step(*[2] * 30)) == Form(128, 97, 65), "60 rows, but 30 sequences and two to pad"
    assert chosen(every, step(1, 800)) is None


def test_cache_slots_follow_the_block_tables() -> None:
    spans = (RowSpan(6, 4, (9, 3, 7)), RowSpan(0, 2, (5,)), RowSpan(8, 1, (0, 1, 2)))
    rows = StepRows((0,) * 7, (6, 7, 8, 9, 0, 1, 8), spans, (6,))
    assert rows.cache_slots(4) == [3 * 4 + 2, 3 * 4 + 3, 7 * 4, 7 * 4 + 1, 5 * 4, 5 * 4 + 1, 2 * 4]


def test_the_head_takes_few_numbers_of_rows() -> None:
    """Those of graphs that decode, whatever is sampled of how many rows."""
    sizes = few_sizes(256)
    assert drawn((0, 1, 2), of=3, there=4, sizes=sizes) == 4, "a graph's rows, padded as they are"
    assert drawn((0, 1, 2), of=3, there=3, sizes=sizes) == (0, 1, 2, 0), "without a graph there is no padding yet"
    assert drawn((4, 9), of=10, there=64, sizes=sizes) == (4, 9)
    assert drawn((4, 9, 11), of=12, there=64, sizes=sizes) == (4, 9, 11, 0)
    for count in range(1, 257):
        picked = drawn(range(count), of=count + 1, there=2048, sizes=sizes)
        assert isinstance(picked, tuple)
        assert len(picked) in sizes
        assert picked[:count] == tuple(range(count))


@pytest.mark.parametrize(
    ("most", "expected"), [(2048, (1024, 1536, 2048)), (3000, (1024, 1536, 2048, 3000)), (768, ()), (900, (900,))]
)
def test_large_sizes(most: int, expected: tuple[int, ...]) -> None:
    assert large_sizes(most) == expected
