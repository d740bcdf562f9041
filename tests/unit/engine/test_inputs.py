"""What goes up to a GPU for a step, in one buffer."""

from __future__ import annotations

import pytest
import torch

from deployments.engine.attention import RowSpan
from deployments.engine.inputs import Inputs, continue_ids, pack, packed_size
from deployments.engine.stages import StepRows

STEP = StepRows((-1, 31, 32), (8, 2, 3), (RowSpan(8, 1, (5, 0, 2)), RowSpan(2, 2, (7,))), (0, 2))


@pytest.mark.parametrize("rows", [3, 4, 7])
def test_a_packed_step_is_its_rows_and_padding(rows: int) -> None:
    packed = pack(STEP, rows, 4, 99, pinned=False)
    buffer, pad = torch.full((len(packed) + 9,), -5), rows - 3
    there = Inputs.view(buffer, rows)
    there.packed.copy_(packed)
    assert len(packed) == packed_size(rows)
    assert there.ids.tolist() == [-1, 31, 32, *[0] * pad]
    assert there.positions.tolist() == [8, 2, 3, *[0] * pad]
    assert there.cache_slots.tolist() == [2 * 4, 7 * 4 + 2, 7 * 4 + 3, *[99] * pad]
    assert buffer[len(packed) :].tolist() == [-5] * 9
    assert all(part.storage_offset() % 2 == 0 for part in (there.ids, there.positions, there.cache_slots))


def test_cleared_inputs_are_padding_alone() -> None:
    buffer = torch.full((packed_size(5),), -5)
    Inputs.view(buffer, 5).clear(99)
    empty = pack(StepRows((), (), (), ()), 5, 4, 99, pinned=False)
    for found, expected in zip(_parts(buffer), _parts(empty), strict=True):
        assert found.tolist() == expected.tolist()


def _parts(buffer: torch.Tensor) -> tuple[torch.Tensor, ...]:
    inputs = Inputs.view(buffer, 5)
    return inputs.ids, inputs.positions, inputs.cache_slots


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((-1, -2, -3), [70, 71, 72]),  # all go on
        ((-1, -2), [70, 71]),  # the last has ended
        ((-2, -3), [71, 72]),  # the first has
        ((-3, -1, 8, 9), [72, 70, 8, 9]),  # beside a chunk, in another order
        ((-1, -2, 8), [70, 71, 8]),
    ],
)
def test_pending_ids_are_filled_in(given: tuple[int, ...], expected: list[int]) -> None:
    ids = torch.tensor([*given, 55])
    continue_ids(ids, given, torch.tensor([70, 71, 72]))
    assert ids.tolist() == [*expected, 55], "padding stays"
