"""The fleets that are simulated. A replica differs from another by its KV capacity; all have the same speed.

32,768 tokens are 4 GiB of KV cache for an 8B Llama: what a 4-bit model leaves on a small GPU, where KV runs out
first.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.routing.speed import STANDARD, Speed


@dataclass(frozen=True, slots=True)
class ReplicaSpec:
    """One simulated replica; the defaults are those of the engine's settings."""

    capacity_tokens: int
    block_size: int = 16
    max_sequences: int = 256
    max_batch_tokens: int = 2048
    prefill_chunk_tokens: int = 512
    speed: Speed = STANDARD

    @property
    def capacity_blocks(self) -> int:
        """KV blocks."""
        return self.capacity_tokens // self.block_size


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
