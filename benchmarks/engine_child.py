"""The parent's end of `benchmarks.engine_alone`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.child import Child
from benchmarks.subject import Subject


@dataclass(frozen=True, slots=True)
class EngineRun:
    """What an engine made of some requests."""

    tokens: int
    """Produced by all requests."""
    seconds: float
    """From the first submission to the last token."""
    full_steps: int
    """Steps in which all clients' requests had their first token and none ended."""
    full_s: float
    """Their time."""


class EngineChild:
    """The parent's end: an engine of what `subject` serves, in a process that ends with `close`."""

    def __init__(self, subject: Subject, logs: Path) -> None:
        self._child = Child("benchmarks.engine_alone", logs / "engine_alone.log", {"TQDM_DISABLE": "1"})
        self._load = {
            "name": subject.model.name,
            "path": str(subject.path),
            "pool": subject.pool.model_dump(mode="json", exclude_unset=True),
            "replicas": sum(pool.most_replicas for model in subject.settings.models for pool in model.pools),
            "home": str(subject.cache_dir.parent),
            "chat_template": subject.model.chat_template,
        }

    def load(self) -> None:
        """Raises ChildFailed."""
        self._child.ask(op="load", **self._load)

    def run(self, prompts: Sequence[str], *, clients: int, output_tokens: int) -> tuple[EngineRun, int]:
        """What it made of the prompts, and how many tokens they were. Raises ChildFailed."""
        answer = self._child.ask(op="run", prompts=list(prompts), clients=clients, output_tokens=output_tokens)
        return EngineRun(**answer["run"]), answer["prompt_tokens"]

    def close(self) -> None:
        """End it."""
        self._child.close()
