"""What serving costs an engine: the same load over HTTP and on the engine alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.client import Answer, LoadFailed, rate
from benchmarks.engine_child import EngineRun

GOAL_RATE = 0.9
"""Of the engine's own tokens/s."""
GOAL_STEP = 1.05
"""Times the engine's own step."""


@dataclass(frozen=True, slots=True)
class Overhead:
    """At one number of clients; times in seconds."""

    clients: int
    engine_tokens_per_s: float
    served_tokens_per_s: float
    """Of the clients' answers, over the time in which any was under way."""
    engine_step_s: float
    """Mean of the steps in which all clients' requests decode."""
    served_step_s: float
    """The same as clients see it: the time in which all streams have begun and none has ended, by tokens of one."""

    @property
    def rate_ratio(self) -> float:
        """Served over alone."""
        return self.served_tokens_per_s / self.engine_tokens_per_s

    @property
    def step_ratio(self) -> float:
        """Served over alone."""
        return self.served_step_s / self.engine_step_s

    def __str__(self) -> str:
        return (
            f"at {self.clients} clients the engine alone makes {self.engine_tokens_per_s:,.1f} tokens/s, served "
            f"{self.served_tokens_per_s:,.1f}; a step of all alone takes {1e3 * self.engine_step_s:.2f} ms, served "
            f"{1e3 * self.served_step_s:.2f} ms"
        )


def overhead(
    clients: int, alone: tuple[EngineRun, EngineRun], burst: Sequence[Answer], steady: Sequence[Answer]
) -> Overhead:
    """Compare.

    Args:
        alone: the engine's runs of the two loads.
        burst: several short answers for each client, one after another.
        steady: one long answer for each client, all at once.

    Raises:
        LoadFailed: there was no step of all clients.
    """
    first, second = alone
    if not second.full_steps:
        raise LoadFailed(f"the engine alone never decoded for all {clients} clients at once; raise --steady-tokens")
    return Overhead(
        clients,
        first.tokens / first.seconds,
        rate(burst),
        second.full_s / second.full_steps,
        common_step_s(steady),
    )


def common_step_s(answers: Sequence[Answer]) -> float:
    """Seconds per token of a stream while all streams run: from the last first piece to the first last piece.

    A piece of text may hold several tokens; they are counted by its length, as a share of the answer's.

    Raises:
        LoadFailed: there is no such time.
    """
    start, end = max(answer.arrivals[0] for answer in answers), min(answer.arrivals[-1] for answer in answers)
    tokens = sum(_tokens_between(answer, start, end) for answer in answers) / len(answers)
    if end <= start or not tokens:
        raise LoadFailed("the streams were never all under way at once; raise --steady-tokens")
    return (end - start) / tokens


def _tokens_between(answer: Answer, start: float, end: float) -> float:
    """By the pieces that came after `start`, up to `end`."""
    pieces = list(zip(answer.arrivals, answer.lengths, strict=True))
    within = sum(length for arrival, length in pieces if start < arrival <= end)
    return answer.output_tokens * within / sum(length for _, length in pieces)
