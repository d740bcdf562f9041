"""The benchmark of the host's part of a step: what counts as which part, and that its steps are steps that decode."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from benchmarks import host_step
from benchmarks.host_step import Clock, main, measure


@pytest.fixture(autouse=True)
def unsettled() -> Iterator[None]:
    threshold = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*threshold)


def test_a_part_is_without_those_that_it_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def passing(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(host_step, "process_time", lambda: now)
    clock = Clock()
    inner = clock.timed("inner", passing)

    def twice() -> None:
        inner(2.0)
        passing(1.0)
        inner(3.0)

    outer = clock.timed("outer", twice)
    outer()
    outer()
    inner(4.0)
    assert clock.seconds == {"inner": 14.0, "outer": 2.0}


def test_each_part_of_a_step_that_decodes_takes_time() -> None:
    parts = measure(2, 3, steps=4, rounds=1)
    known = {"schedule", "rows", "draw", "land", "complete", "read", "pack rows", "pack tables", "the rest"}
    assert parts.keys() == known
    assert all(seconds > 0 for seconds in parts.values())


def test_what_is_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_step, "measure", lambda slots, sequences: {"land": 4e-6 * sequences, "rows": 1e-6 * slots})
    main(["--slots", "2", "--sequences", "1,4"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [[*line[:-8], line[-8], line[-4]] for line in lines[1:]] == [
        ["2", "slots", "of", "1", "6.0", "6.00"],
        ["land", "4.0", "4.00"],
        ["rows", "2.0", "2.00"],
        ["2", "slots", "of", "4", "18.0", "4.50"],
        ["land", "16.0", "4.00"],
        ["rows", "2.0", "0.50"],
    ]
