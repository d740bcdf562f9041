"""The bare engine, in one process and without HTTP, router or ledger: how long it takes to the first token.

The difference between a client's time to the first token and this one is what serving adds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.child import answer_lines
from deployments.engine.loader import load
from deployments.engine.loop import Engine
from deployments.engine.messages import EngineLimits
from deployments.protocol import GenerationRequest, Sampling
from placement.export import from_json


class BareEngine:
    """One loaded engine; `handle` answers the parent's requests."""

    def __init__(self) -> None:
        self._engine: Any = None
        self._tokenizer: Any = None
        self._requests = 0

    def handle(self, op: str, **arguments: Any) -> dict[str, Any]:
        operations: dict[str, Callable[..., dict[str, Any]]] = {"load": self._load, "first_tokens": self._first_tokens}
        return operations[op](**arguments)

    def _load(self, path: str, plan: str, cache: str, limits: dict[str, Any]) -> dict[str, Any]:
        placed = from_json(plan)
        model = load(Path(path), placed, device_type="cpu", cache_dir=Path(cache))
        self._engine = Engine(model, placed, EngineLimits(**limits))
        self._tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        return {}

    def _first_tokens(self, prompts: list[str], output_tokens: int) -> dict[str, Any]:
        """Seconds from text to the first token, one request at a time; each runs to its end.

        Rendering and tokenising are on the clock: they are no part of what HTTP, router and ledger add.
        """
        return {"seconds": [self._first_token(prompt, output_tokens) for prompt in prompts]}

    def _first_token(self, prompt: str, output_tokens: int) -> float:
        sent = time.perf_counter()
        ids = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        self._requests += 1
        sampling = Sampling(max_tokens=output_tokens, seed=0, temperature=0.0)
        self._engine.submit(GenerationRequest(f"bare-{self._requests}", tuple(ids), sampling))
        while not self._engine.step():
            pass
        first = time.perf_counter() - sent
        while self._engine.has_work():
            self._engine.step()
        return first


if __name__ == "__main__":
    answer_lines(BareEngine().handle)
