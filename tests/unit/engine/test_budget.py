"""How a step's tokens are divided between decodes and prompts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from deployments.engine.budget import Chunks, chunk_within, counted_decodes, measured_chunks, prefill_budget, quarters


@pytest.mark.parametrize(
    ("decodes", "decoding", "prefilling", "expected"),
    [
        (0, 0, 1, 512),  # nobody waits for a token
        (1, 1, 1, 64),
        (32, 32, 1, 64),
        (0, 32, 1, 64),  # those that decode are in other slots, and wait behind this step
        (480, 480, 1, 32),  # what the decodes left
        (512, 600, 1, 0),
        (32, 32, 2, 64),
        (32, 32, 3, 128),  # a burst: two more prompts in 32 that decode
        (64, 64, 4, 64),
        (4, 4, 60, 508),  # 120 chunks are more than the step holds
    ],
)
def test_prompts_get_what_the_policy_says(decodes: int, decoding: int, prefilling: int, expected: int) -> None:
    budget = prefill_budget(
        decodes=decodes, decoding=decoding, prefilling=prefilling, max_batch_tokens=512, chunks=Chunks.fixed(64)
    )
    assert budget == expected


@pytest.mark.parametrize(
    ("decodes", "decoding", "prefilling", "expected"),
    [
        (0, 64, 1, 192),  # of other slots alone: the first entry
        (63, 63, 1, 192 - 63),
        (64, 64, 1, 192 - 64),
        (65, 65, 1, 384 - 65),
        (128, 128, 1, 384 - 128),
        (200, 200, 1, 320 - 200),
        (240, 240, 1, 90),  # the least
        (128, 256, 1, 384 - 128),  # by how many decode in this step, not in all slots
        (128, 128, 9, 2 * 256),  # a burst: twice the chunk
        (256, 256, 300, 768),
    ],
)
def test_a_chunk_fills_the_step_of_the_nearest_count_at_or_above(
    decodes: int, decoding: int, prefilling: int, expected: int
) -> None:
    chunks = Chunks(((64, 192), (128, 384), (200, 320)), 90)
    budget = prefill_budget(
        decodes=decodes, decoding=decoding, prefilling=prefilling, max_batch_tokens=1024, chunks=chunks
    )
    assert budget == expected


@pytest.mark.parametrize(
    ("entries", "least"), [((), 1), (((64, 192),), 0), (((64, 192), (64, 256)), 1), (((128, 192), (64, 256)), 1)]
)
def test_chunks_that_make_no_table_are_refused(entries: tuple[tuple[int, int], ...], least: int) -> None:
    with pytest.raises(ValueError, match="the fewer decodes before the more, and a prompt token at least"):
        Chunks(entries, least)


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ([(128, 6.0), (192, 8.0), (256, 10.0), (320, 11.0)], 192),  # 256 with 64 decodes: just within 10
        ([(128, 6.0), (192, 10.1), (256, 9.0)], 64),  # what comes after one that is too slow is not trusted
        ([(128, 11.0), (192, 12.0)], 64),  # the smallest, however slow
        ([(128, 1.0), (192, 2.0)], 128),  # all are quick
        ([], 448),  # no step to try: what the decodes leave
    ],
)
def test_a_chunk_keeps_its_step_within_the_limit(times: list[tuple[int, float]], expected: int) -> None:
    assert chunk_within(times, limit=10.0, decodes=64, max_batch_tokens=512) == expected


def test_a_step_of_decodes_alone_leaves_a_token_for_prompts() -> None:
    assert chunk_within([], limit=10.0, decodes=64, max_batch_tokens=64) == 1


def test_nothing_is_timed_beyond_the_first_that_is_too_slow() -> None:
    timed: list[int] = []

    def times() -> Iterator[tuple[int, float]]:
        for tokens in (128, 192, 256, 320):
            timed.append(tokens)
            yield tokens, float(tokens)

    assert chunk_within(times(), limit=200.0, decodes=64, max_batch_tokens=512) == 128
    assert timed == [128, 192, 256]


def test_each_count_of_decodes_has_a_limit_of_its_own() -> None:
    """2.5 times 4, 6 and 10 ms: 10, 15 and 25."""
    times = [(320, 9.0), (512, 14.0), (640, 18.0), (768, 21.0), (896, 25.0), (1024, 29.0)]
    chunks = measured_chunks([(32, 4.0), (128, 6.0), (224, 10.0)], times, max_batch_tokens=2048)
    assert chunks.entries == ((32, 320), (128, 512), (224, 896))


def test_no_chunk_is_smaller_than_the_least_unless_steps_are() -> None:
    times = [(128, 20.0), (256, 40.0), (512, 80.0)]
    assert measured_chunks([(64, 4.0)], times, max_batch_tokens=512).beside(64) == 256
    assert measured_chunks([(64, 4.0)], times[:1], max_batch_tokens=200).beside(64) == 200


def test_steps_are_timed_once_and_up_to_the_first_that_is_too_slow_for_all() -> None:
    timed: list[int] = []

    def times() -> Iterator[tuple[int, float]]:
        for tokens in range(128, 2048, 128):
            timed.append(tokens)
            yield tokens, tokens / 32

    measured_chunks([(64, 4.0), (128, 5.0)], times(), max_batch_tokens=2048)
    assert timed == [128, 256, 384, 512], "16 ms are more than 2.5 times 5"


def test_a_count_that_no_step_with_a_chunk_was_timed_beside_has_no_entry() -> None:
    chunks = measured_chunks([(64, 4.0), (768, 30.0), (896, 35.0)], [(512, 9.0), (800, 11.0)], max_batch_tokens=2048)
    assert chunks.entries == ((64, 512), (768, 800))
    assert chunks.beside(768) == 256


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        (256, (64, 80, 96, 112, 128, 160, 192, 224)),
        (257, (64, 80, 96, 112, 128, 160, 192, 224, 256)),
        (96, (64, 80)),
        (65, (64,)),
        (64, (64,)),
        (3, (3,)),
    ],
)
def test_which_decodes_chunks_are_measured_against(most: int, expected: tuple[int, ...]) -> None:
    assert counted_decodes(most) == expected


def test_quarters() -> None:
    assert list(quarters(769, 3000)) == [896, 1024, 1280, 1536, 1792, 2048, 2560]
    assert list(quarters(64, 64)) == [64]
    assert list(quarters(64, 63)) == []
