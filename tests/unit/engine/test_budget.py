"""How a step's tokens are divided between decodes and prompts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from deployments.engine.budget import chunk_within, prefill_budget


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
        decodes=decodes, decoding=decoding, prefilling=prefilling, max_batch_tokens=512, prefill_chunk_tokens=64
    )
    assert budget == expected


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
