"""What a process says of itself: counts since its start, and how things stand. Plain values that cross processes."""

from __future__ import annotations

from dataclasses import dataclass

from deployments.metrics.histogram import Buckets
from placement.outline import Outline


@dataclass(frozen=True, slots=True)
class GrantCounts:
    """How grants compared with what their requests came to need; blocks, over the requests that ended."""

    granted: int = 0
    unused: int = 0
    """Granted, and never needed."""
    beyond: int = 0
    """Needed beyond the grant."""

    def with_ended(self, granted: int, needed: int) -> GrantCounts:
        """One more request ended. What it needed counts in full, blocks that it shared with others too."""
        unused, beyond = max(0, granted - needed), max(0, needed - granted)
        return GrantCounts(self.granted + granted, self.unused + unused, self.beyond + beyond)


@dataclass(frozen=True, slots=True)
class ReplicaVitals:
    """One replica, since the start of its engine."""

    held_blocks: int
    """In use by requests, each block once however many share it."""
    cached_blocks: int
    """Kept by the prefix cache alone."""
    running: int
    waiting: int
    """Requests taken up and not running: not admitted yet, or preempted."""
    preemptions: int
    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens found in the prefix cache."""
    output_tokens: int
    steps: Buckets
    """Seconds of each step."""
    busy_s: tuple[float, ...]
    """Seconds that each stage has computed; empty where it is not measured."""
    predicted_bytes: tuple[int, ...]
    """By the plan, on each stage's GPU; empty on the CPU."""
    measured_bytes: tuple[int, ...]
    """Taken on each stage's GPU; empty on the CPU."""
    grants: GrantCounts
    outline: Outline | None = None
    """Of its plan; at the start and every ten seconds, as it does not change."""


@dataclass(frozen=True, slots=True)
class IngressCounts:
    """One model at one ingress, since the ingress's start."""

    model: str
    """As configured; empty for requests that named no served model."""
    outcomes: tuple[tuple[str, int], ...]
    """(how they ended, HTTP requests)."""
    first_token: Buckets
    token_gaps: Buckets
    queue: Buckets


@dataclass(frozen=True, slots=True)
class IngressVitals:
    """One ingress process."""

    ingress_id: str
    sequence: int
    """Grows, so that of two the newer is known: a counter that went back would count as started anew."""
    models: tuple[IngressCounts, ...]
