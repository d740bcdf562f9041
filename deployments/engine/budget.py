"""How a step's tokens are divided between sequences that decode and prompts that are computed."""

from __future__ import annotations

from collections.abc import Iterable

BURST = 32
"""Prompts are a burst from one more in so many sequences that decode. One alone never is."""


def prefill_budget(
    *, decodes: int, decoding: int, prefilling: int, max_batch_tokens: int, prefill_chunk_tokens: int
) -> int:
    """Most prompt tokens of one step, after its decodes.

    While nothing decodes, prompts take the whole step. Otherwise they take a chunk, so that no sequence waits much
    longer than usual for its next token. A burst of prompts takes as many times the chunk as it is a burst: large
    chunks cost less per token, each prompt done is one more sequence that decodes, and the wait is shared by all.

    Args:
        decodes: tokens that the step decodes.
        decoding: sequences, of all slots, that had their first token; all of them wait for this step.
        prefilling: sequences, of all slots, that didn't have it yet, with those that could be admitted now.
        max_batch_tokens: most tokens of a step.
        prefill_chunk_tokens: prompt tokens that may go beside the decodes of a step at any time.
    """
    left = max_batch_tokens - decodes
    if decoding == 0:
        return left
    return min(left, prefill_chunk_tokens * max(1, BURST * (prefilling - 1) // decoding))


def chunk_within(times: Iterable[tuple[int, float]], *, limit: float, decodes: int, max_batch_tokens: int) -> int:
    """Prompt tokens that go beside so many decodes in a step that takes `limit` at most.

    Args:
        times: (tokens of a step, how long it takes), the smaller before the larger; read up to the first over `limit`.
        limit: in the unit of the times.
        decodes: tokens of such a step that are decodes.
        max_batch_tokens: tokens of a step where no time is given.

    Returns:
        Those of the largest step within the limit. Where none is, those of the smallest: prompts must end.
    """
    most = None
    for tokens, time in times:
        if most is None or time <= limit:
            most = tokens
        if time > limit:
            break
    return max(1, (max_batch_tokens if most is None else most) - decodes)
