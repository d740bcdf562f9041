"""The engine alone under a load that a service is given too: in one process, without replica, ledger and HTTP.

A child of `serve_load`; it plans and loads as a replica's engine does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.child import answer_lines
from benchmarks.closed_loop import closed_loop
from deployments.api.codec import TextCodec
from deployments.engine.garbage import settle_garbage
from deployments.engine.loader import load
from deployments.engine.loop import Engine
from deployments.engine.messages import EngineSpec
from deployments.engine.process import limits_of
from deployments.planning import plan_pool
from deployments.protocol import GenerationRequest, Sampling
from deployments.settings import PoolSettings


class EngineAlone:
    """One loaded engine; `handle` answers the parent's requests."""

    def __init__(self) -> None:
        self._engine: Any = None
        self._text: Any = None
        self._runs = 0

    def handle(self, op: str, **arguments: Any) -> dict[str, Any]:
        operations: dict[str, Callable[..., dict[str, Any]]] = {"load": self._load, "run": self._run}
        return operations[op](**arguments)

    def _load(
        self, name: str, path: str, pool: dict[str, Any], replicas: int, home: str, chat_template: str | None
    ) -> dict[str, Any]:
        folders = {"cache_dir": Path(home) / "quantized", "kernels_dir": Path(home) / "kernels"}
        spec = EngineSpec(name, Path(path), PoolSettings.model_validate(pool), replicas, **folders)
        plan, device_type = plan_pool(name, spec.model_dir, spec.pool)
        limits = limits_of(spec, plan, device_type)
        model = load(spec.model_dir, plan, device_type=device_type, cache_dir=spec.cache_dir, limits=limits)
        self._engine = Engine(model, plan, limits)
        self._text = TextCodec.load(spec.model_dir, chat_template)
        settle_garbage()
        return {"attention": model.attention}

    def _run(self, prompts: list[str], clients: int, output_tokens: int) -> dict[str, Any]:
        """Chat turns of exactly so many output tokens; tokenising is off the clock."""
        self._runs += 1
        sampling = Sampling(max_tokens=output_tokens, seed=0, temperature=0.0)
        requests = [
            GenerationRequest(f"{self._runs}-{i}", self._ids(prompt), sampling) for i, prompt in enumerate(prompts)
        ]
        run = closed_loop(self._engine, requests, clients)
        return {"run": asdict(run), "prompt_tokens": sum(len(request.prompt_ids) for request in requests)}

    def _ids(self, prompt: str) -> tuple[int, ...]:
        ids: tuple[int, ...] = asyncio.run(self._text.encode_chat([{"role": "user", "content": prompt}]))
        return ids


if __name__ == "__main__":
    answer_lines(EngineAlone().handle)
