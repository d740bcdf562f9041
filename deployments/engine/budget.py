"""How a step's tokens are divided between sequences that decode and prompts that are computed."""

from __future__ import annotations

DRAIN_STEPS = 32
"""Steps within which the prompts that are there now shall be computed."""


def prefill_budget(
    *, decodes: int, decoding: int, prefilling: int, backlog: int, max_batch_tokens: int, prefill_chunk_tokens: int
) -> int:
    """Most prompt tokens of one step, after its decodes.

    While nothing decodes, prompts take the whole step. Otherwise they take a chunk, so that no sequence waits much
    longer than usual for its next token. Prompts that outnumber the sequences that decode get as many times the chunk:
    each sequence has about the same share of the time, and a burst isn't held up by the few that came first. And a
    backlog is drained within `DRAIN_STEPS`: large chunks cost less per token, and each prompt done is one more that
    decodes.

    Args:
        decodes: tokens that the step decodes.
        decoding: sequences, of all slots, that had their first token; all of them wait for this step.
        prefilling: sequences, of all slots, that didn't have it yet, with those that could be admitted now.
        backlog: prompt tokens of those that are `prefilling`.
        max_batch_tokens: most tokens of a step.
        prefill_chunk_tokens: prompt tokens whose computing takes about as long as a step that only decodes.
    """
    left = max_batch_tokens - decodes
    if decoding == 0:
        return left
    return min(left, max(prefill_chunk_tokens * max(1, prefilling // decoding), backlog // DRAIN_STEPS))
