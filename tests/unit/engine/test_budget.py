"""How a step's tokens are divided between decodes and prompts."""

from __future__ import annotations

import pytest

from deployments.engine.budget import prefill_budget


@pytest.mark.parametrize(
    ("decodes", "decoding", "prefilling", "expected"),
    [
        (0, 0, 1, 512),  # nobody waits for a token
        (1, 1, 1, 64),
        (32, 32, 1, 64),
        (0, 32, 1, 64),  # those that decode are in other slots, and wait behind this step
        (480, 480, 1, 32),  # what the decodes left
        (512, 600, 1, 0),
        (32, 32, 8, 64),
        (32, 32, 9, 128),  # a burst: two more prompts in eight that decode
        (4, 4, 60, 508),  # 120 chunks are more than the step holds
    ],
)
def test_prompts_get_what_the_policy_says(decodes: int, decoding: int, prefilling: int, expected: int) -> None:
    budget = prefill_budget(
        decodes=decodes, decoding=decoding, prefilling=prefilling, max_batch_tokens=512, prefill_chunk_tokens=64
    )
    assert budget == expected
