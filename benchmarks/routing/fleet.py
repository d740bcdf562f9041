"""The fleets that are simulated. A replica differs from another by its KV capacity; all have the same speed.

32,768 tokens are 4 GiB of KV cache for an 8B Llama: what a 4-bit model leaves on a small GPU, where KV runs out
first.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from benchmarks.routing.speed import STANDARD, Speed
from deployments.engine.budget import Chunks, counted_decodes, measured_chunks


@dataclass(frozen=True, slots=True)
class ReplicaSpec:
    """One simulated replica; the defaults are those of the engine's settings."""

    capacity_tokens: int
    block_size: int = 16
    max_sequences: int = 256
    max_batch_tokens: int = 2048
    prefill_chunk_tokens: int | None = None
    """Beside decodes; None: as many as an engine of this speed finds at its start."""
    speed: Speed = STANDARD

    @property
    def capacity_blocks(self) -> int:
        """KV blocks."""
        return self.capacity_tokens // self.block_size

    @property
    def chunks(self) -> Chunks:
        """Prompt tokens beside decodes."""
        if self.prefill_chunk_tokens is not None:
            return Chunks.fixed(self.prefill_chunk_tokens)
        rows = self.max_batch_tokens
        return _measured(self.speed, min(rows, self.max_sequences), rows, self.capacity_tokens)


@lru_cache
def _measured(speed: Speed, sequences: int, rows: int, capacity_tokens: int) -> Chunks:
    """By the engine's own rule; as there all rows of a step with a chunk are one sequence's."""
    usual = [(count, _microseconds(speed.step(count, count, 0))) for count in counted_decodes(sequences)]
    sizes = range(_STEP_OF_ROWS, rows + 1, _STEP_OF_ROWS)
    return measured_chunks(
        usual,
        ((tokens, _microseconds(speed.step(tokens, 1, 0))) for tokens in sizes),
        kv_token_ps=round(1e12 * speed.per_kv_token),
        most_kv_tokens=capacity_tokens,
        max_batch_tokens=rows,
    )


def _microseconds(seconds: float) -> int:
    return round(1e6 * seconds)


_STEP_OF_ROWS = 64
"""Steps with chunks are timed at each multiple; an engine's graphs lie 64 to 128 rows apart, larger steps a fourth."""
UNIT = 16_384
"""Tokens of KV cache of the smallest replica."""


def _equal(count: int, units: int = 2) -> tuple[ReplicaSpec, ...]:
    return (ReplicaSpec(units * UNIT),) * count


FLEETS: dict[str, tuple[ReplicaSpec, ...]] = {
    "equal": _equal(8),
    "unequal": (*_equal(3, 1), *_equal(3, 2), *_equal(2, 4)),
    "roomy": _equal(8, 32),
    "64": _equal(64),
    "1000": _equal(1000),
}
