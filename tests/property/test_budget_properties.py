"""Laws of how a step is divided, whatever the times that chunks were measured by."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

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

TIMES = st.dictionaries(st.integers(1, 3000), st.integers(0, 10**5), max_size=6).map(lambda d: tuple(sorted(d.items())))
CHUNKS = st.builds(Chunks, TIMES.filter(bool), TIMES, st.integers(0, 10**6), st.integers(1, 600))
KV_TOKENS = st.integers(0, 10**6)


@given(CHUNKS, st.integers(0, 400), KV_TOKENS, st.integers(0, 400), st.integers(0, 300), st.integers(1, 4096))
def test_prompts_get_a_chunk_at_least_and_no_more_than_the_step_has_left(
    chunks: Chunks, decodes: int, kv_tokens: int, elsewhere: int, prefilling: int, max_batch_tokens: int
) -> None:
    decodes = min(decodes, max_batch_tokens)

    def budget(prompts: int) -> int:
        return prefill_budget(
            decodes=decodes,
            kv_tokens=kv_tokens,
            decoding=decodes + elsewhere,
            prefilling=prompts,
            max_batch_tokens=max_batch_tokens,
            chunks=chunks,
        )

    assert 0 <= budget(prefilling) <= max_batch_tokens - decodes
    assert budget(prefilling) >= min(max_batch_tokens - decodes, chunks.beside(decodes, kv_tokens)), "less than a chunk"
    assert budget(prefilling + 1) >= budget(prefilling), "more prompts never get less"
    if decodes + elsewhere == 0:
        assert budget(prefilling) == max_batch_tokens


@given(CHUNKS, st.integers(0, 400), KV_TOKENS)
def test_a_chunk_fills_a_timed_step_or_is_the_least(chunks: Chunks, decodes: int, kv_tokens: int) -> None:
    tokens = chunks.beside(decodes, kv_tokens)
    assert isinstance(tokens, int)
    assert tokens == chunks.least or tokens + decodes in dict(chunks.mixed)


@given(CHUNKS, st.integers(0, 400), KV_TOKENS, KV_TOKENS)
def test_longer_contexts_never_make_a_chunk_smaller(chunks: Chunks, decodes: int, some: int, more: int) -> None:
    assert chunks.beside(decodes, some) <= chunks.beside(decodes, some + more)
    assert chunks.beside(decodes, 0) == replace(chunks, kv_token_ps=0).beside(decodes, more)


@given(st.integers(1, 400), st.integers(1, 3000), st.integers(0, 10**5), KV_TOKENS, st.integers(0, 10**6), st.data())
def test_a_step_with_a_chunk_takes_as_long_as_it_may(
    sequences: int, max_batch_tokens: int, kv_token_ps: int, most_kv_tokens: int, kv_tokens: int, data: st.DataObject
) -> None:
    """Or is the smallest beside its decodes. Longer contexts than can be are within the limit too."""
    counts = counted_decodes(min(sequences, max_batch_tokens))
    sizes = list(quarters(64, max_batch_tokens))
    usual, mixed = (list(zip(each, data.draw(rising(len(each))), strict=True)) for each in (counts, sizes))
    chunks = measured_chunks(
        usual, mixed, kv_token_ps=kv_token_ps, most_kv_tokens=most_kv_tokens, max_batch_tokens=max_batch_tokens
    )
    assert chunks.mixed == tuple(mixed[: len(chunks.mixed)]), "read up to one that is too long"
    assert chunks.least == min(LEAST_CHUNK, max_batch_tokens)
    kv = kv_token_ps * kv_tokens // 10**6
    for count, time in usual:
        chunk = chunks.beside(count, kv_tokens)
        assert chunk <= max_batch_tokens
        larger = [(rows, taken) for rows, taken in mixed if rows > count]
        within = [rows for rows, taken in larger if taken + kv <= CHUNK_SLOWDOWN * (time + kv)]
        expected = max(chunks.least, max(within, default=larger[0][0] if larger else 0) - count)
        assert chunk == expected if kv_tokens <= most_kv_tokens else chunk <= expected


def rising(count: int) -> st.SearchStrategy[list[int]]:
    """Microseconds of larger and larger steps."""
    more = st.lists(st.integers(0, 9000), min_size=count, max_size=count)
    return more.map(lambda each: list(accumulate(each)))
