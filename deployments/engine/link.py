"""A link: what goes from one GPU to another, on streams beside the compute streams, one message per slot at a time."""

from __future__ import annotations

import torch
from torch import Tensor


class Link:
    """Carries tensors of up to `shape` from `source` to `target`.

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
        self._source, self._target = source, target
        self._inbox = [torch.zeros(shape, dtype=dtype, device=target) for _ in range(slots)]
        self._leaving, self._landing = torch.cuda.Stream(source), torch.cuda.Stream(target)
        self._arrived = [torch.cuda.Event() for _ in range(slots)]
        self._read = [torch.cuda.Event() for _ in range(slots)]

    def send(self, slot: int, message: Tensor) -> None:
        """Queue a copy of `message`, as it will be when the source's compute stream gets here.

        The source's compute stream goes on once the copy is done, so `message` may be overwritten by its next step.
        """
        compute = torch.cuda.current_stream(self._source)
        self._leaving.wait_stream(compute)
        self._landing.wait_event(self._read[slot])
        box = self._inbox[slot][tuple(slice(0, size) for size in message.shape)]
        with torch.cuda.stream(self._leaving), torch.cuda.stream(self._landing):
            box.copy_(message, non_blocking=True)
        self._arrived[slot].record(self._landing)
        compute.wait_stream(self._leaving)

    def receive(self, slot: int) -> Tensor:
        """The slot's buffer; the target's compute stream waits until the message is in it."""
        torch.cuda.current_stream(self._target).wait_event(self._arrived[slot])
        return self._inbox[slot]

    def release(self, slot: int) -> None:
        """The target's compute stream, when it gets here, is done with the message."""
        self._read[slot].record(torch.cuda.current_stream(self._target))
