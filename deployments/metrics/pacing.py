"""How often what is measured goes along with other messages."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

VITALS_EVERY_S = 1.0
OUTLINE_EVERY_S = 10.0
"""Less than what makes the board forget (`board.FORGET_S`); a new ledger is without plans for so long."""


def seldom(
    read: Callable[[], T], every_s: float = VITALS_EVERY_S, clock: Callable[[], float] = time.monotonic
) -> Callable[[], T | None]:
    """`read`, but None where less than `every_s` seconds have passed since it was last called."""
    due = clock()

    def when_due() -> T | None:
        nonlocal due
        if clock() < due:
            return None
        due = clock() + every_s
        return read()

    return when_due
