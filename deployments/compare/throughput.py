"""Requests at once through an engine, to their end: tokens/s, and how long each waited."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from deployments.engine.loop import Engine
from deployments.protocol import GenerationRequest, Sampling


@dataclass(frozen=True, slots=True)
class Step:
    """One call of the engine's `step`."""

    ms: float
    tokens: int
    """Produced by the requests together."""
    running: int
    """Sequences in the pipeline afterwards, those in the middle of their prompts among them."""


@dataclass(frozen=True, slots=True)
class Burst:
    """Requests that came at once, each with as many output tokens."""

    outputs: int
    """Tokens that each produced."""
    seconds: float
    """From the first submission to the last token."""
    first_token_s: tuple[float, ...]
    """Of each request, from the submission."""
    request_s: tuple[float, ...]
    """Likewise, to its last token; in the same order."""
    steps: tuple[Step, ...]
    decode_ms: tuple[float, ...]
    """Of the steps in which every request had its first token."""

    @property
    def tokens_per_s(self) -> float:
        """Output tokens of all requests together."""
        return len(self.request_s) * self.outputs / self.seconds

    @property
    def token_s(self) -> float:
        """Time per output token after the first: the median over requests of each one's mean."""
        waits = zip(self.first_token_s, self.request_s, strict=True)
        return statistics.median((last - first) / max(1, self.outputs - 1) for first, last in waits)

    @property
    def step_ms(self) -> float:
        """Median step once all decode, without the first quarter of them."""
        return statistics.median(self.decode_ms[len(self.decode_ms) // 4 :])


def burst(
    engine: Engine,
    requests: int,
    inputs: int,
    outputs: int,
    *,
    tag: str = "",
    clock: Callable[[], float] = time.perf_counter,
) -> Burst:
    """Run so many greedy requests, submitted at once, to their end.

    Args:
        inputs: tokens of each prompt; the prompts are random and share nothing.
        outputs: tokens of each answer, end tokens or not.
        tag: makes the prompts other ones.

    Raises:
        RuntimeError: a request failed, or the idle engine holds blocks.
    """
    seed = f"{tag}{requests}"
    prompts = list(random_prompts(engine, requests, inputs, seed))
    began = now = clock()
    for i, prompt in enumerate(prompts):
        engine.submit(GenerationRequest(f"{seed}-{i}", prompt, Sampling(max_tokens=outputs, seed=0, temperature=0.0)))
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    steps: list[Step] = []
    decoding: list[float] = []
    while engine.has_work():
        chunks = engine.step()
        before, now = now, clock()
        for chunk in chunks:
            if chunk.error:
                raise RuntimeError(chunk.error)
            first.setdefault(chunk.request_id, now - began)
            if chunk.finish_reason:
                last[chunk.request_id] = now - began
        ms = 1e3 * (now - before)
        steps.append(Step(ms, sum(len(chunk.token_ids) for chunk in chunks), engine.scheduler.running))
        if len(first) == requests and chunks:
            decoding.append(ms)
    if engine.blocks.held_blocks:
        raise RuntimeError(f"{engine.blocks.held_blocks} blocks are held while idle")
    return Burst(
        outputs, now - began, tuple(first.values()), tuple(last[i] for i in first), tuple(steps), tuple(decoding)
    )


def random_prompts(engine: Engine, count: int, length: int, seed: str) -> Iterator[tuple[int, ...]]:
    """Prompts of so many tokens, always the same for a seed."""
    draw = random.Random(seed)
    for _ in range(count):
        yield tuple(draw.randrange(3, engine.vocab_size) for _ in range(length))
