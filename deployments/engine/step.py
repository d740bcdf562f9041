"""One micro-batch as the scheduler plans it: token ids, positions and block tables as plain integers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class StepItem(NamedTuple):
    """One sequence's part of a step. A step makes one for each: a tuple takes a third of a frozen dataclass's time."""

    request_id: str
    start: int
    """Position of the first token computed; the KV of all positions before it is written by then."""
    ids: tuple[int, ...]
    """The tokens fed, at positions start, start + 1, ... A negative one, -1 - row, is the id that sampled row `row` of
    the slot's step before this one drew, which the host has not read yet; it comes alone."""
    block_table: tuple[int, ...]
    """Blocks of positions 0 .. start + len(ids) - 1; position p is in block_table[p // block_size]."""
    samples: bool
    """Whether `ids` ends with the sequence's last token, so that the next one is sampled."""

    @property
    def end(self) -> int:
        """Past the last position computed: tokens of the sequence with this step."""
        return self.start + len(self.ids)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One micro-batch: what one slot computes next."""

    slot: int
    step: int
    """Unique, rising with each step scheduled."""
    items: tuple[StepItem, ...]
    sampled: int
    """Items that sample."""
