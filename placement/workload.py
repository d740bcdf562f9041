"""What a replica is asked to run at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Attention = Literal["flashinfer", "torch"]
"""What computes attention on GPUs: FlashInfer, or PyTorch's own operators over gathered blocks, as on the CPU."""

CAPTURED_ROWS = 768
"""Rows of the largest CUDA graph of a step with prompt chunks on one GPU; the largest of decodes has a row per
sequence, and on several GPUs the largest steps have graphs too."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What a replica is asked to run at once."""

    block_size: int
    """Tokens per KV block."""
    max_batch_tokens: int
    """Tokens of one step."""
    max_sequences: int
    """Sequences running at once."""
    max_context: int
    """Tokens of the longest sequence, prompt and output."""
    kv_dtype: str
    attention: Attention | None = None
    """None: FlashInfer on GPUs, where it has kernels for the model. Models that attend in code of their own get the
    gather cache whatever is said here."""

    @property
    def most_blocks(self) -> int:
        """Blocks that all sequences together can hold at most."""
        return self.max_sequences * -(-self.max_context // self.block_size)

    def captured_rows(self, devices: int) -> int:
        """Rows of the largest CUDA graph of a replica on so many GPUs, at most."""
        if devices > 1:
            return self.max_batch_tokens
        return min(self.max_batch_tokens, max(CAPTURED_ROWS, self.max_sequences))
