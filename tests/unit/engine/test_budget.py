"""How a step's tokens are divided between decodes and prompts."""

from __future__ import annotations

import pytest

from deployments.engine.budget import prefill_budget


@pytest.mark.parametrize(
    ("decodes", "decoding", "prefilling", "backlog", "expected"),
    [
        (0, 0, 1, 700, 512),  # nobody waits for a token
        (1, 1, 1, 700, 64),
        (32, 32, 1, 700, 64),
        (0, 32, 1, 700, 64),  # those that decode are in other slots, and wait behind this step
        (480, 480, 1, 700, 32),  # what the decodes left
        (512, 600, 1, 700, 0),
        (8, 8, 15, 700, 64),
        (8, 8, 16, 700, 128),  # two prompts for each that decodes
        (4, 4, 60, 700, 508),  # a burst: 15 chunks are more than the step holds
        (8, 8, 8, 32 * 100, 100),  # prompts long enough for 32 steps of 100 tokens
    ],
)
def test_prompts_get_what_the_policy_says(
    decodes: int, decoding: int, prefilling: int, backlog: int, expected: int
) -> None:
    budget = prefill_budget(
        decodes=decodes,
        decoding=decoding,
        prefilling=prefilling,
        backlog=backlog,
        max_batch_tokens=512,
        prefill_chunk_tokens=64,
    )
    assert budget == expected
