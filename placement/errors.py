"""What placement raises on purpose.

    PlacementError          the input can't be planned: unknown unit, unknown model, a cap for a device that isn't there
    └── DoesNotFit          the model doesn't fit; carries need, have and the knobs that would mend it

`str()` of each is one line.
"""

from __future__ import annotations


class PlacementError(Exception):
    """The question can't be answered as it was put. The message names what was wrong and what is accepted."""


class DoesNotFit(PlacementError):
    """No split of the layers keeps every GPU within its budget.

    Args:
        model: the model's name.
        need: bytes per GPU, in device order, of the split that misses by least (0 for a GPU it leaves empty).
        have: budget bytes per GPU, in device order.
        knobs: sentences, each one change that makes the plan fit, checked by solving again with it.
    """

    def __init__(self, model: str, need: tuple[int, ...], have: tuple[int, ...], knobs: tuple[str, ...]) -> None:
        self.model, self.need, self.have, self.knobs = model, need, have, knobs
        gpus = ", ".join(
            f"device {i} needs {n:,} bytes and has {h:,}" for i, (n, h) in enumerate(zip(need, have, strict=True))
        )
        mend = "; or ".join(knobs) if knobs else "no single setting mends it: use a smaller model or larger devices"
        super().__init__(f"{model} does not fit: {gpus}. To mend: {mend}")

    def __reduce__(self) -> tuple[type[DoesNotFit], tuple[object, ...]]:
        # An exception is pickled with its message alone, from which it could not be made again.
        return type(self), (self.model, self.need, self.have, self.knobs)
