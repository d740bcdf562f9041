"""One simulated request, and what became of it. Times in seconds of simulated time, lengths in tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

GRANULE = 64
"""Tokens of one shareable piece of a prompt; a multiple of every block size used here."""


@dataclass(slots=True)
class Job:
    """Arrival, size and content of a request; the fields from `first_token_at` on are filled by the run."""

    index: int
    arrival: float
    prompt: int
    output: int
    """Tokens it will produce; the routers don't know it."""
    max_tokens: int
    granules: tuple[int, ...] = ()
    """Ids of the full granules of prompt and output together; equal ids mean equal tokens up to there. Empty where
    nothing is shared, which is the same as ids that never repeat."""

    first_token_at: float = math.inf
    ended_at: float = math.inf
    refused: bool = False
    preemptions: int = 0
    cached: int = 0
    """Prompt tokens found in the prefix cache at its first admission."""

    @property
    def ttft(self) -> float:
        """Time to the first token; infinite for a refused request."""
        return self.first_token_at - self.arrival

    @property
    def end_to_end(self) -> float:
        """Time to the last token; infinite for a refused request."""
        return self.ended_at - self.arrival
