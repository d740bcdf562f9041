"""How a step's tokens are divided between decodes and prompts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest

from deployments.engine.budget import Chunks, counted_decodes, measured_chunks, prefill_budget, quarters, rows_within


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
        decodes=decodes,
        kv_tokens=100 * decodes,
        decoding=decoding,
        prefilling=prefilling,
        max_batch_tokens=512,
        chunks=Chunks.fixed(64),
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
        (200, 200, 1, 512 - 200),
        (250, 250, 1, 512 - 250),  # more than were timed
        (440, 440, 1, 90),  # the least
        (128, 256, 1, 384 - 128),  # by how many decode in this step, not in all slots
        (128, 128, 9, 2 * 256),  # a burst: twice the chunk
        (256, 256, 300, 768),
    ],
)
def test_a_chunk_fills_the_step_of_the_nearest_count_at_or_above(
    decodes: int, decoding: int, prefilling: int, expected: int
) -> None:
    """2.5 times 4, 6 and 10 ms: 10, 15 and 25."""
    chunks = Chunks(((64, 4000), (128, 6000), (200, 10000)), ((192, 9000), (384, 15000), (512, 20000)), 0, 90)
    budget = prefill_budget(
        decodes=decodes,
        kv_tokens=10**6,
        decoding=decoding,
        prefilling=prefilling,
        max_batch_tokens=1024,
        chunks=chunks,
    )
    assert budget == expected


@pytest.mark.parametrize(
    ("kv_tokens", "rows"),
    [
        (0, 384),
        (100, 384),
        (3124, 384),
        (3125, 512),  # 2.5 times 5.9 and 0.1, less 0.1 for the step's own reading: 14.9 ms
        (268_800, 896),  # 128 sequences of 2,100 tokens: 14.8 and 1.5 times 8.6
        (10**6, 1280),
    ],
)
def test_the_longer_the_contexts_the_more_rows_a_step_may_have(kv_tokens: int, rows: int) -> None:
    """A step with a chunk reads the same KV, and may take 2.5 times as long as its decodes."""
    mixed = ((384, 12500), (512, 14900), (640, 19400), (768, 23000), (896, 26700), (1024, 30100), (1280, 37000))
    assert Chunks(((128, 5900),), mixed, 32_000, 256).beside(128, kv_tokens) == rows - 128


def test_a_step_that_is_too_slow_beside_few_decodes_may_be_the_smallest_there_is() -> None:
    chunks = Chunks(((64, 4000),), ((128, 11000), (512, 20000)), 1000, 1)
    assert chunks.beside(64, 0) == 64, "prompts must end"
    assert chunks.beside(64, 7 * 10**6) == 512 - 64, "2.5 * 11 - 7 ms"
    assert Chunks(((64, 4000),), ((64, 4000),), 0, 30).beside(64, 0) == 30, "no larger step was timed"


@pytest.mark.parametrize(
    ("decodes", "mixed", "kv_token_ps", "least"),
    [
        ((), (), 0, 1),
        (((64, 1),), (), 0, 0),
        (((64, 1),), (), -1, 1),
        (((64, 1), (64, 2)), (), 0, 1),
        (((128, 2), (64, 1)), (), 0, 1),
        (((64, 1),), ((128, 2), (128, 3)), 0, 1),
    ],
)
def test_chunks_of_no_times_are_refused(
    decodes: tuple[tuple[int, int], ...], mixed: tuple[tuple[int, int], ...], kv_token_ps: int, least: int
) -> None:
    with pytest.raises(ValueError, match="the fewer before the more, none below zero for a token of KV, and a prompt"):
        Chunks(decodes, mixed, kv_token_ps, least)


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ([(128, 6.0), (192, 8.0), (256, 10.0), (320, 11.0)], 256),  # just within 10
        ([(128, 6.0), (192, 10.1), (256, 9.0)], 128),  # what comes after one that is too slow is not trusted
        ([(128, 11.0), (192, 12.0)], 128),  # the smallest, however slow
        ([(128, 1.0), (192, 2.0)], 192),  # all are quick
        ([], 0),
    ],
)
def test_rows_within_a_limit(times: list[tuple[int, float]], expected: int) -> None:
    assert rows_within(times, 10.0) == expected


def measured(
    decodes: list[tuple[int, int]], mixed: Iterable[tuple[int, int]], *, kv_token_ps: int = 0, most: int = 2048
) -> Chunks:
    return measured_chunks(decodes, mixed, kv_token_ps=kv_token_ps, most_kv_tokens=10**6, max_batch_tokens=most)


def test_each_count_of_decodes_has_a_limit_of_its_own() -> None:
    """2.5 times 4, 6 and 10: 10, 15 and 25."""
    times = [(320, 9), (512, 14), (640, 18), (768, 21), (896, 25), (1024, 29)]
    chunks = measured([(32, 4), (128, 6), (224, 10)], times)
    assert [chunks.beside(count, 0) + count for count in (32, 128, 224)] == [320, 512, 896]


def test_no_chunk_is_smaller_than_the_least_unless_steps_are() -> None:
    times = [(128, 20), (256, 40), (512, 80)]
    assert measured([(64, 4)], times, most=512).beside(64, 0) == 256
    assert measured([(64, 4)], times[:1], most=200).beside(64, 0) == 200


@pytest.mark.parametrize(
    ("kv_token_ps", "last"),
    [
        (0, 512),  # 16 ms are more than 2.5 times 5
        (4000, 640),  # 18.5 ms where the contexts take 4 ms, the most they may
        (1_000_000, 1920),
    ],
)
def test_steps_are_timed_once_and_up_to_the_first_that_is_too_slow_for_all(kv_token_ps: int, last: int) -> None:
    timed: list[int] = []

    def times() -> Iterator[tuple[int, int]]:
        for tokens in range(128, 2048, 128):
            timed.append(tokens)
            yield tokens, tokens * 1000 // 32

    measured([(64, 4000), (128, 5000)], times(), kv_token_ps=kv_token_ps)
    assert timed == list(range(128, last + 1, 128))


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
