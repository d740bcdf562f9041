"""What a step's graphs read of its rows, packed so that one copy uploads it to each GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from deployments.engine.stages import StepRows


@dataclass(frozen=True, slots=True)
class Inputs:
    """A packed buffer, on the host or on a device, and views of it; int64 [rows] each, padding included."""

    packed: Tensor
    """All of it, int64 [packed_size(rows)]: what is copied."""
    ids: Tensor
    positions: Tensor
    cache_slots: Tensor
    """Block * block_size + offset of each row's token."""

    @classmethod
    def view(cls, buffer: Tensor, rows: int) -> Inputs:
        """The front of a buffer, `packed_size(rows)` elements. Where each starts follows from `rows`, for graphs."""
        packed = buffer[: packed_size(rows)]
        return cls(packed, *packed.view(3, -1)[:, :rows].unbind())

    def clear(self, scratch: int) -> None:
        """Let all rows be padding: a first token with id 0, in the cache slot `scratch` that nobody reads."""
        self.ids.zero_()
        self.positions.zero_()
        self.cache_slots.fill_(scratch)


def packed_size(rows: int) -> int:
    """Elements of a packed buffer. Each part starts at a multiple of 16 bytes, as compiled code likes its inputs."""
    return 3 * -(-rows // 2) * 2


def pack(step: StepRows, rows: int, block_size: int, scratch: int, *, pinned: bool) -> Tensor:
    """int64 [packed_size(rows)] on the host: the step's rows, and behind them padding as in `Inputs.clear`."""
    count = len(step.ids)
    packed = torch.empty(packed_size(rows), dtype=torch.int64, pin_memory=pinned)
    ids, positions, cache_slots = packed.numpy().reshape(3, -1)
    ids[:count], positions[:count], cache_slots[:count] = step.ids, step.positions, step.cache_slots(block_size)
    ids[count:], positions[count:], cache_slots[count:] = 0, 0, scratch
    return packed


def continue_ids(ids: Tensor, given: tuple[int, ...], last_ids: Tensor) -> None:
    """Overwrite the ids that the host did not know.

    Args:
        ids: int64 [rows]; the first of them are `given`.
        given: -1 - i for what row i of the slot's step before drew.
        last_ids: int64: what that step drew, on the device of `ids`.
    """
    ids = ids[: len(given)]
    if given[-1] == -len(given) and given == _all_of(
        len(given)
    ):  # who decodes mostly goes on doing so: one copy instead of five kernels
        ids.copy_(last_ids[: len(given)])
    else:
        torch.where(ids < 0, last_ids[(-1 - ids).clamp_(min=0)], ids, out=ids)


@lru_cache(maxsize=1024)
def _all_of(count: int) -> Sequence[int]:
    return tuple(range(-1, -1 - count, -1))
