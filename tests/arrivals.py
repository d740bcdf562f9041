"""Requests that arrive while others run, so that steps mix prompts with decodes."""

from __future__ import annotations

from collections.abc import Sequence

from deployments.engine.loop import Engine
from deployments.protocol import GenerationRequest, TokenChunk


def chunks_of(engine: Engine, requests: Sequence[GenerationRequest], *, per_step: int) -> dict[str, list[TokenChunk]]:
    """All chunks of each request, of which `per_step` more arrive at each step; the engine stays open.

    Checks the accounts at each step, that each request ends once and without an error, and that no block stays behind.
    """
    chunks: dict[str, list[TokenChunk]] = {request.request_id: [] for request in requests}
    waiting = list(requests)
    while waiting or engine.has_work():
        for request in waiting[:per_step]:
            engine.submit(request)
        del waiting[:per_step]
        for chunk in engine.step():
            assert chunk.error is None
            chunks[chunk.request_id].append(chunk)
        engine.check_integrity()
    for request_id, mine in chunks.items():
        assert [chunk.finish_reason is not None for chunk in mine] == [False] * (len(mine) - 1) + [True], request_id
    assert engine.blocks.held_blocks == 0
    return chunks


def tokens_of(engine: Engine, requests: Sequence[GenerationRequest], *, per_step: int) -> dict[str, tuple[int, ...]]:
    """As `chunks_of`; the tokens of each request."""
    found = chunks_of(engine, requests, per_step=per_step)
    return {name: tuple(token for chunk in mine for token in chunk.token_ids) for name, mine in found.items()}
