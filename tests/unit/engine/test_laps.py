"""The stopwatch of the loader."""

from __future__ import annotations

from deployments.engine.laps import Laps


def test_laps_follow_each_other_and_add_up_by_name() -> None:
    times = iter((10.0, 12.0, 12.5, 13.25))
    laps = Laps(lambda: next(times))
    laps.lap("read")
    laps.lap("settle")
    laps.lap("read")
    assert laps.seconds == {"read": 2.75, "settle": 0.5}
    assert str(laps) == "read 2.8 s, settle 0.5 s"
