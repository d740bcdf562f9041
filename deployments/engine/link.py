"""A link: what goes from one GPU to another, on streams beside the compute streams, one message per slot at a time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

_VIEWS = 1024
"""Of messages, by slot and shape, that are kept."""


class Link:
    """Carries tensors of up to `shape` from `source` to `target`. The compute stream of either is its default one.

    Without peer access between the two, CUDA stages the copy through the host; nothing changes here.

    Args:
        source: the sending GPU.
        target: the receiving GPU; holds a buffer of `shape` per slot.
        slots: messages that may be on their way or unread at once.
        shape: of the largest message.
        dtype: of all messages.
    """

    def __init__(
        self, source: torch.device, target: torch.device, *, slots: int, shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        self._inbox = [torch.zeros(shape, dtype=dtype, device=target) for _ in range(slots)]
        self._box = lru_cache(_VIEWS)(lambda slot, shape: _front(self._inbox[slot], shape))
        self._sent = list(self._inbox)
        """Each slot's last message, where it arrives."""
        self._writer, self._reader = torch.cuda.default_stream(source), torch.cuda.default_stream(target)
        # PyTorch copies on the source's current stream, which waits for the target's and is waited for by it. Neither
        # may be the default one: on that, CUDA lets a copy between two GPUs wait for all that either has to compute.
        self._leaving, self._landing = torch.cuda.Stream(source), torch.cuda.Stream(target)
        self._written, self._left = torch.cuda.Event(), torch.cuda.Event()
        self._arrived = [torch.cuda.Event() for _ in range(slots)]
        self._read = [torch.cuda.Event() for _ in range(slots)]

    def send(self, slot: int, message: Tensor) -> None:
        """Queue a copy of `message`, as it will be when the source's compute stream gets here.

        That stream goes on once the copy is done, so `message` may be overwritten by its next step.
        """
        box = self._sent[slot] = self._box(slot, message.shape)
        self._written.record(self._writer)
        self._written.wait(self._leaving)
        self._read[slot].wait(self._landing)
        with self._leaving, self._landing:
            box.copy_(message, non_blocking=True)
        self._arrived[slot].record(self._landing)
        self._left.record(self._leaving)
        self._left.wait(self._writer)

    def receive(self, slot: int) -> Tensor:
        """The slot's last message; the target's compute stream waits until it is there."""
        self._arrived[slot].wait(self._reader)
        return self._sent[slot]

    def release(self, slot: int) -> None:
        """The target's compute stream, when it gets here, is done with the message."""
        self._read[slot].record(self._reader)


def _front(buffer: Tensor, shape: Sequence[int]) -> Tensor:
    """The first elements of `buffer` in every dimension, as many as `shape` says."""
    for dimension, size in enumerate(shape):
        if size < buffer.shape[dimension]:
            buffer = buffer.narrow(dimension, 0, size)
    return buffer
