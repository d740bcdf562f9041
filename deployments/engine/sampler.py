"""The sampler of the last stage's device: what it keeps between steps, and the one call of a step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deployments.engine.draw import Draw
from deployments.engine.history import TokenHistory
from deployments.engine.sampling import SampledToken, SamplingBatch, sample


@dataclass(frozen=True, slots=True)
class Drawn:
    """A step's draws, on their way to the host."""

    ids: Tensor
    """int64 [rows], on the device."""
    tokens: list[SampledToken]

    def read(self) -> list[SampledToken]:
        """The draws on the host, one per row. Waits for this step alone."""
        return self.tokens


class Sampler:
    """Draws the tokens of a replica's steps.

    Args:
        device: of the last stage.
        vocab_size: width of the logits.
        num_blocks: KV blocks of the replica, less the scratch block.
        block_size: tokens per block.
    """

    def __init__(self, device: torch.device, *, vocab_size: int, num_blocks: int, block_size: int) -> None:
        self.history = TokenHistory(num_blocks, block_size, device)
        self._device = device
        self._vocab_size = vocab_size

    def note_inputs(self, ids: Tensor, slots: Tensor) -> None:
        """Keep a step's input ids, before the step's `draw`.

        Args:
            ids: int64 or int32 [T].
            slots: int64 [T], block * block_size + offset, as in the KV cache; the scratch block's for padding.
        """
        self.history.note(ids, slots)

    @torch.inference_mode()
    def draw(self, logits: Tensor, draw: Draw) -> Drawn:
        """One token per row of `logits` [rows, vocab], any float dtype, left as it is."""
        batch = SamplingBatch.build(draw.rows, vocab_size=self._vocab_size, device=self._device)
        sampled = sample(logits, batch, draw.positions)
        return Drawn(sampled.ids, sampled.read())
