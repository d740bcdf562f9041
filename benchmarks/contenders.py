"""What Headroom is measured against: sequential `generate()`, and its own engine without the service around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.child import Child
from benchmarks.subject import Subject
from benchmarks.workload import CYCLE, prompts
from placement.export import to_json


@dataclass(frozen=True, slots=True)
class SequentialRun:
    """What `generate()` made of some prompts, one after the other."""

    prompts: tuple[str, ...]
    prompt_tokens: tuple[int, ...]
    texts: tuple[str, ...]
    seconds: tuple[float, ...]
    tokens_per_s: float
    """Output tokens over the wall time of all prompts."""


class Contenders:
    """The sequential baseline and the bare engine, each in a process of its own that sleeps when not asked."""

    def __init__(self, subject: Subject, logs: Path, output_tokens: int) -> None:
        self._subject = subject
        self._output_tokens = output_tokens
        env = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
        self._sequential = Child("benchmarks.sequential", logs / "sequential.log", env)
        self._engine = Child("benchmarks.bare_engine", logs / "engine.log", env)
        self.sweep: dict[str, float] = {}
        """The baseline's tokens/s by thread count."""

    def load(self) -> None:
        """Load both models, and find the baseline's best thread count."""
        plan, path, pool = to_json(self._subject.plan), str(self._subject.path), self._subject.pool
        self._sequential.ask(op="load", path=path, plan=plan)
        texts = prompts("sweep", CYCLE)[2::3]  # of middling length
        self.sweep = self._sequential.ask(op="sweep", prompts=texts, output_tokens=self._output_tokens)["rates"]
        limits = {
            "max_batch_tokens": pool.batch_tokens("cpu"),
            "max_sequences": pool.max_sequences,
            "prefix_cache": pool.prefix_cache,
            "threads": self._subject.threads,
        }
        self._engine.ask(op="load", path=path, plan=plan, cache=str(self._subject.cache_dir), limits=limits)
        self.first_tokens(prompts("warm-up", 4))

    def generate(self, texts: Sequence[str]) -> SequentialRun:
        """One run of the baseline, on its best thread count."""
        run = self._sequential.ask(op="generate", prompts=list(texts), output_tokens=self._output_tokens)
        return SequentialRun(
            tuple(texts), tuple(run["prompt_tokens"]), tuple(run["texts"]), tuple(run["seconds"]), run["tokens_per_s"]
        )

    def first_tokens(self, texts: Sequence[str]) -> list[float]:
        """Seconds to the bare engine's first token, per prompt."""
        seconds: list[float] = self._engine.ask(op="first_tokens", prompts=list(texts), output_tokens=4)["seconds"]
        return seconds

    def close(self) -> None:
        self._sequential.close()
        self._engine.close()
