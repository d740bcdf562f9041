"""Block tables packed for paged kernels."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deployments.engine import attention_tables
from deployments.engine.attention import RowSpan
from deployments.engine.attention_tables import MOST_KNOWN, Shape, Tables, _pack_any, pack


def packed(spans: list[RowSpan], block_size: int, size: int = 4096) -> tuple[Shape, Tables]:
    buffer = torch.full((size,), -1, dtype=torch.int32)
    shape = pack(spans, block_size, buffer.numpy())
    return shape, Tables.view(buffer, shape)


def test_a_mixed_step() -> None:
    shape, tables = packed([RowSpan(2, 3, (7, 5)), RowSpan(6, 1, (1, 0)), RowSpan(0, 4, (9, 8))], 4)
    assert shape == Shape(sequences=3, rows=8, pages=5)
    assert not shape.decodes
    assert tables.query_starts.tolist() == [0, 3, 4, 8]
    assert tables.page_starts.tolist() == [0, 2, 4, 5]
    assert tables.last_page_tokens.tolist() == [1, 3, 4]
    assert tables.lengths.tolist() == [5, 7, 4]
    assert tables.row_sequences.tolist() == [0, 0, 0, 1, 2, 2, 2, 2]
    assert tables.positions.tolist() == [2, 3, 4, 6, 0, 1, 2, 3]
    assert tables.pages[:5].tolist() == [7, 5, 1, 0, 9], "blocks behind the step's last token are left out"


def test_decodes() -> None:
    shape, tables = packed([RowSpan(0, 1, (3,)), RowSpan(4, 1, (2, 6))], 4)
    assert shape.decodes
    assert tables.query_starts.tolist() == [0, 1, 2]
    assert tables.last_page_tokens.tolist() == [1, 1]


@given(st.integers(1, 40), st.integers(0, 60), st.integers(0, 60))
def test_where_tables_start_depends_on_sequences_and_rows_alone(sequences: int, few: int, many: int) -> None:
    """A captured graph keeps the addresses."""
    buffer = torch.zeros(4096, dtype=torch.int32)
    views = [Tables.view(buffer, Shape(sequences, sequences, pages)) for pages in (few, many)]
    names = [field.name for field in fields(Tables) if field.name != "shape"]
    places = [[getattr(view, name).data_ptr() for name in names] for view in views]
    assert places[0] == places[1]
    assert all(place % 16 == buffer.data_ptr() % 16 for place in places[0])
    assert len(views[0].pages) == len(views[1].pages), "a view to the buffer's end"


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9)), min_size=1, max_size=12),
    st.sampled_from((1, 4, 16)),
)
def test_every_row_is_where_its_table_says(parts: list[tuple[int, int]], block_size: int) -> None:
    spans = [RowSpan(start, count, tuple(range(100 * i, 100 * i + 50))) for i, (start, count) in enumerate(parts)]
    shape, tables = packed(spans, block_size)
    row = 0
    for i, span in enumerate(spans):
        for position in range(span.start, span.start + span.count):
            assert (tables.row_sequences[row], tables.positions[row]) == (i, position)
            page = tables.pages[tables.page_starts[i] + position // block_size]
            assert page == span.block_table[position // block_size]
            row += 1
        end = (tables.page_starts[i + 1] - tables.page_starts[i] - 1) * block_size + tables.last_page_tokens[i]
        assert end == span.start + span.count == tables.lengths[i]
    assert row == shape.rows == tables.query_starts[-1]


@given(
    st.lists(st.tuples(st.integers(0, 3000), st.booleans()), min_size=1, max_size=12),
    st.lists(st.integers(2, 9), max_size=3),
    st.integers(1, 40),
)
def test_splits_cover_the_decodes_and_are_bounded(
    ahead: list[tuple[int, bool]], chunks: list[int], splits: int
) -> None:
    """Whatever their lengths, and with sequences without rows between them and the chunks."""
    spans = [RowSpan(start, 1, tuple(range(200))) for start, there in ahead if there]
    singles = len(spans)
    spans += [RowSpan(0, 0, ())] * sum(not there for _, there in ahead)
    spans += [RowSpan(0, count, (1,)) for count in chunks]
    buffer = torch.full((8192,), -1, dtype=torch.int32)
    tables = Tables.view(buffer, pack(spans, 16, buffer.numpy(), splits=splits))
    each, counts = int(tables.split_tokens), tables.split_starts.diff().tolist()
    assert tables.split_starts[0] == 0
    assert counts[:singles] == [-(-(span.start + 1) // each) for span in spans[:singles]]
    assert not any(counts[singles:])
    assert sum(counts) <= singles + splits


@given(
    st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 3)), min_size=1, max_size=40),
    st.sampled_from((1, 4, 16)),
    st.integers(1, 40),
)
def test_decodes_alone_have_the_tables_that_any_step_would_have(
    sequences: list[tuple[int, int]], block_size: int, splits: int
) -> None:
    """To the last bit, whether or not a table has more blocks than are needed."""
    spans = [
        RowSpan(start, 1, tuple(range(i, i + start // block_size + 1 + more)))
        for i, (start, more) in enumerate(sequences)
    ]
    starts, counts = np.array([span.start for span in spans], np.int32), np.ones(len(spans), np.int32)
    found, expected = (torch.full((2**18,), -1, dtype=torch.int32) for _ in range(2))
    shape = pack(spans, block_size, found.numpy(), splits=splits)
    assert shape == _pack_any(spans, starts, counts, block_size, expected.numpy(), splits)
    for field in fields(Tables):
        if field.name != "shape":
            tables = (getattr(Tables.view(buffer, shape), field.name) for buffer in (found, expected))
            assert torch.equal(*tables), field.name


def test_short_decodes_are_not_split() -> None:
    """Where there are many, each has one program: merging would cost more than it gives."""
    _, tables = packed([RowSpan(199, 1, tuple(range(20)))] * 100, 16, size=8192)
    assert tables.split_starts.tolist() == list(range(101))


def test_tables_are_their_own_however_many_were_packed_before() -> None:
    """What is kept of them goes by the object, and an object's place in memory is used again."""
    kept = [RowSpan(9, 1, (i, i + 1, i + 2)) for i in range(3)]
    for i in range(3 * MOST_KNOWN // 2):
        passing = RowSpan(5, 1, (i, -i))
        _, tables = packed([kept[i % 3], passing], 4, size=64)
        assert tables.pages[:5].tolist() == [i % 3, i % 3 + 1, i % 3 + 2, i, -i]
    grown = (*kept[0].block_table, 77)
    _, tables = packed([RowSpan(12, 1, grown), RowSpan(4, 2, grown)], 4, size=64)
    assert tables.pages[:6].tolist() == [0, 1, 2, 77, 0, 1], "as many blocks as the rows need"


def test_of_long_tables_fewer_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_tables, "MOST_BLOCKS", 64)
    for i in range(40):
        table = tuple(range(i, i + 16))
        _, tables = packed([RowSpan(63, 1, table)], 4, size=64)
        assert tables.pages[:16].tolist() == list(table)
    assert len(attention_tables._known) == len(attention_tables._kept) <= 64 // 16


def test_a_buffer_too_small_says_by_how_much() -> None:
    spans = [RowSpan(9, 1, (0, 1, 2))] * 3
    need = pack(spans, 4, np.zeros(1000, np.int32)).size
    pack(spans, 4, np.zeros(need, np.int32))
    with pytest.raises(ValueError, match=rf"3 sequences with 3 rows and 9 blocks are {need} integers, .* {need - 1}"):
        pack(spans, 4, np.zeros(need - 1, np.int32))
