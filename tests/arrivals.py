"""Requests that arrive while others run, so that steps mix prompts with decodes."""

from __future__ import annotations

from collections.abc import Sequence

from deployments.engine.loop import Engine
from deployments.protocol import GenerationRequest


def two_at_each_step(engine: Engine, requests: Sequence[GenerationRequest]) -> dict[str, tuple[int, ...]]:
    """What each request gets, of which two more arrive at each step. Checks the accounts at each step, and that no
    block stays behind; the engine stays open."""
    outputs: dict[str, tuple[int, ...]] = {request.request_id: () for request in requests}
    waiting = list(requests)
    while waiting or engine.has_work():
        for request in waiting[:2]:
            engine.submit(request)
        del waiting[:2]
        for chunk in engine.step():
            assert chunk.error is None
            outputs[chunk.request_id] += chunk.token_ids
        engine.check_integrity()
    assert engine.blocks.held_blocks == 0
    return outputs
