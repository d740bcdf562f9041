"""The benchmark of the host's part of a step: what counts as which part, and that its steps are steps that decode."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks import host_step
from benchmarks.host_step import Clock, decoding, main, measure
from benchmarks.no_cuda import Event, no_cuda
from deployments.engine.flashinfer_kernels import OWN


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
    accounts = {"schedule", "rows", "draw", "land", "complete", "read", "the rest"}
    launch = {"launch", "lanes", "load", "pack rows", "prepare", "pack tables", "links", "greedy"}
    assert parts.keys() == accounts | launch
    assert all(seconds > 0 for seconds in parts.values())


def test_decodes_run_as_on_gpus() -> None:
    """By a graph, each slot's step behind the ids that its last one drew, and none of its attention planned."""
    with no_cuda():
        engine = decoding(2, 3)
        steps = [engine.step() for _ in range(4)]
        pipeline: Any = engine.pipeline
    assert [len(chunks) for chunks in steps] == [3] * 4
    assert pipeline.depth == 2
    assert all(lane._graphs.keys() == set(lane.forms) for lane in pipeline._lanes)
    plans = [plan for lane in pipeline._lanes for plan in lane.stage.attention._planned.values()]
    assert plans == [[OWN]] * 2
    assert torch.cuda.Event is not Event, "all is as it was"


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
