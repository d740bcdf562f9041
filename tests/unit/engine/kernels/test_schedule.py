"""The division of work: examples by hand. tests/property has the laws."""

from __future__ import annotations

import pytest

from deployments.engine.kernels.schedule import Schedule, make_schedule


def test_work_is_divided_across_panels() -> None:
    schedule = Schedule(panels=3, steps=4, programs=5)  # 12 units: 2, 2, 3, 2, 3
    assert [schedule.span(p) for p in range(5)] == [(0, 2), (2, 4), (4, 7), (7, 9), (9, 12)]
    assert [list(schedule.contributors(panel)) for panel in range(3)] == [[0, 1], [2, 3], [3, 4]]
    assert schedule.slot(3, 1) == 6  # began before its span
    assert schedule.slot(3, 2) == 7  # begins inside and ends after it


def test_no_more_programs_than_units() -> None:
    assert make_schedule(128, 64, panel_rows=128, step_columns=256, programs=264) == Schedule(1, 1, 1)


def test_last_panel_and_step_may_be_partial() -> None:
    assert make_schedule(130, 257, panel_rows=128, step_columns=256, programs=2) == Schedule(2, 2, 2)


def test_overflow_is_refused() -> None:
    with pytest.raises(ValueError, match="overflow 32 bits"):
        make_schedule(2**24, 2**20, panel_rows=16, step_columns=64, programs=264)
