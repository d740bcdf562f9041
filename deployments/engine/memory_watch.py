"""What is taken on the stages' GPUs, looked at now and then: asking the driver is too slow for every step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

EVERY_S = 5.0


class MemoryWatch:
    """Bytes taken by all processes, as `benchmarks/placement_error.py` measures them.

    Args:
        devices: of the stages, in order.
        clock: seconds, never going back.
    """

    def __init__(self, devices: Sequence[torch.device], clock: Callable[[], float] = time.monotonic) -> None:
        self._gpus = [device for device in devices if device.type == "cuda"]
        self._clock = clock
        self._taken: tuple[int, ...] = ()
        self._looked_at = -EVERY_S

    def taken(self) -> tuple[int, ...]:
        """One per stage, at most `EVERY_S` old while steps run; empty on the CPU."""
        now = self._clock()
        if self._gpus and now - self._looked_at >= EVERY_S:
            self._looked_at = now
            self._taken = tuple(total - free for free, total in map(torch.cuda.mem_get_info, self._gpus))
        return self._taken
