"""Laws of how a step is divided, whatever the times that chunks were measured by."""

from __future__ import annotations

from itertools import accumulate, pairwise

from hypothesis import given
from hypothesis import strategies as st

from deployments.engine.budget import (
    CHUNK_SLOWDOWN,
    LEAST_CHUNK,
    Chunks,
    counted_decodes,
    measured_chunks,
    prefill_budget,
    quarters,
)

TABLES = st.builds(
    lambda rows, least: Chunks(tuple(sorted(rows.items())), least),
    st.dictionaries(st.integers(1, 300), st.integers(1, 3000), min_size=1, max_size=5),
    st.integers(1, 600),
)


@given(TABLES, st.integers(0, 400), st.integers(0, 400), st.integers(0, 300), st.integers(1, 4096))
def test_prompts_get_a_chunk_at_least_and_no_more_than_the_step_has_left(
    chunks: Chunks, decodes: int, elsewhere: int, prefilling: int, max_batch_tokens: int
) -> None:
    decodes = min(decodes, max_batch_tokens)

    def budget(prompts: int) -> int:
        return prefill_budget(
            decodes=decodes,
            decoding=decodes + elsewhere,
            prefilling=prompts,
            max_batch_tokens=max_batch_tokens,
            chunks=chunks,
        )

    assert 0 <= budget(prefilling) <= max_batch_tokens - decodes
    assert budget(prefilling) >= min(max_batch_tokens - decodes, chunks.beside(decodes)), "less than a chunk"
    assert budget(prefilling + 1) >= budget(prefilling), "more prompts never get less"
    if decodes + elsewhere == 0:
        assert budget(prefilling) == max_batch_tokens


@given(TABLES, st.integers(0, 400))
def test_a_chunk_fills_a_step_of_the_table_or_is_the_least(chunks: Chunks, decodes: int) -> None:
    above = [rows for count, rows in chunks.entries if count >= decodes]
    rows = (above or [chunks.entries[-1][1]])[0]
    assert chunks.beside(decodes) == max(chunks.least, rows - decodes)


@given(st.integers(1, 400), st.integers(1, 3000), st.data())
def test_measured_chunks_where_more_rows_take_longer(
    sequences: int, max_batch_tokens: int, data: st.DataObject
) -> None:
    """The more decode, the more rows a step may have, the decodes among them; prompt tokens alone may well be fewer."""
    counts = counted_decodes(min(sequences, max_batch_tokens))
    sizes = list(quarters(64, max_batch_tokens))
    more = st.lists(st.floats(0.0, 9.0), min_size=len(counts), max_size=len(counts))
    usual = list(zip(counts, accumulate(data.draw(more), initial=1.0), strict=False))
    more = st.lists(st.floats(0.0, 9.0), min_size=len(sizes), max_size=len(sizes))
    mixed = list(zip(sizes, accumulate(data.draw(more), initial=1.0), strict=False))

    chunks = measured_chunks(usual, mixed, max_batch_tokens=max_batch_tokens)
    assert chunks.entries[0][0] == counts[0]
    assert all(before[1] <= after[1] for before, after in pairwise(chunks.entries))
    assert chunks.least == min(LEAST_CHUNK, max_batch_tokens)
    for count, rows in chunks.entries:
        assert count < rows <= max(max_batch_tokens, count + 1)
        larger = [(size, ms) for size, ms in mixed if size > count]
        if larger:
            assert dict(larger)[rows] <= CHUNK_SLOWDOWN * dict(usual)[count] or rows == larger[0][0]
