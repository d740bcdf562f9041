"""The requests that take the most memory."""

from __future__ import annotations

from collections.abc import Sequence

from deployments.engine.loop import Engine
from deployments.protocol import GenerationRequest, Sampling


def serve(engine: Engine, prompts: Sequence[tuple[int, ...]], output_tokens: int) -> None:
    """Serve `prompts` together, each with every sampling setting that needs memory.

    Raises:
        RuntimeError: a request failed.
    """
    for i, prompt in enumerate(prompts):
        sampling = Sampling(
            max_tokens=output_tokens, seed=i, temperature=0.8, top_p=0.9, top_k=50, logprobs=5, repetition_penalty=1.1
        )
        engine.submit(GenerationRequest(f"{i}", prompt, sampling))
    while engine.has_work():
        for chunk in engine.step():
            if chunk.error:
                raise RuntimeError(chunk.error)
