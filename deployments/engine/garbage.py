"""Python's search for garbage in cycles, in a process whose steps must not wait for it."""

from __future__ import annotations

import gc

_MADE_BETWEEN = 20_000
"""Objects made, and not yet let go, between two searches. A step of 256 sequences makes 1,500, and of Python's 700 it
would search three times: a tenth of what its host does. What a step makes has no cycles."""


def settle_garbage() -> None:
    """Search what is here for the last time, and what will come less often."""
    gc.collect()
    gc.freeze()  # looking through a loaded model would stop a step for a quarter of a second now and then
    gc.set_threshold(_MADE_BETWEEN, *gc.get_threshold()[1:])
