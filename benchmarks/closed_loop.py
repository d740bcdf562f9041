"""Requests through an engine, so many at a time: the next is submitted when one ends. What `benchmarks.client` is over
HTTP."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable

from benchmarks.engine_child import EngineRun
from deployments.engine.loop import Engine
from deployments.protocol import GenerationRequest


def closed_loop(
    engine: Engine,
    requests: Iterable[GenerationRequest],
    clients: int,
    clock: Callable[[], float] = time.perf_counter,
) -> EngineRun:
    """Run all requests to their ends, `clients` at a time.

    Raises:
        RuntimeError: one failed.
    """
    waiting = iter(requests)
    began = before = clock()
    tokens, full_steps, full_s = 0, 0, 0.0
    decoding: set[str] = set()
    for request in itertools.islice(waiting, clients):
        engine.submit(request)
    while engine.has_work():
        full = len(decoding) == clients
        chunks = engine.step()
        now = clock()
        for chunk in chunks:
            if chunk.error:
                raise RuntimeError(chunk.error)
            tokens += len(chunk.token_ids)
            decoding.add(chunk.request_id)
            if chunk.finish_reason is not None:
                decoding.discard(chunk.request_id)
                full = False
                if (following := next(waiting, None)) is not None:
                    engine.submit(following)
        if full:
            full_steps, full_s = full_steps + 1, full_s + now - before
        before = now
    return EngineRun(tokens, before - began, full_steps, full_s)
