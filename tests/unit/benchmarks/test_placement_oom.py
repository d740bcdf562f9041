"""The benchmark serves what it draws, and says so when something goes wrong."""

from __future__ import annotations

import random
import subprocess
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch

from benchmarks import placement_oom
from benchmarks.placement_oom import draw, in_child, line, main, run, weights_of

SERVED: dict[str, Any] = {
    "number": 3, "seconds": 2.0, "case": "llama", "refused": 1, "allowed": [1000, 2000], "capacity": 64,
    "attention": "flashinfer", "tokens": 50, "held": [990, 1500],
}  # fmt: skip
SHORT: dict[str, Any] = {"number": 4, "seconds": 1.0, "case": "phi3", "refused": 0, "out_of_memory": "tried 2 GiB"}
FAILED: dict[str, Any] = {"number": 5, "seconds": 1.0, "failed": "no such model"}


def test_a_case_is_planned_loaded_and_served(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # In this process: another one takes 10 s to import what it needs.
    monkeypatch.setattr(placement_oom, "in_child", lambda *case: {"number": case[1], "seconds": 1.0, **run(*case)})
    assert main(["--device", "cpu", "--cases", "1", "--seed", "2"]) == 0
    served, verdict = capsys.readouterr().out.splitlines()
    assert " s served: " in served
    assert verdict.endswith(" 1 planned and run: 0 out of memory, 0 failed otherwise, 1 served")


def test_children(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter(
        [CompletedProcess((), 0, 'printed by others\n{"case": "llama"}\n', ""), CompletedProcess((), -9, "", "")]
    )
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: next(answers))
    assert in_child(0, 7, "cpu", 1)["case"] == "llama"
    killed = in_child(0, 8, "cpu", 1)
    assert (killed["number"], killed["failed"]) == (8, "ended with code -9")


def test_equal_seeds_draw_equal_cases_within_their_limits() -> None:
    assert str(draw(random.Random(9), "cuda", 2)) == str(draw(random.Random(9), "cuda", 2))
    drawn = [draw(random.Random(seed), "cuda", 2) for seed in range(40)]
    assert len({str(case) for case in drawn}) == 40
    assert {len(case.pool.max_memory) for case in drawn} == {1, 2}
    assert all(weights_of(case.config) <= 10**9 for case in drawn if case.family != "mixtral")


def test_out_of_memory_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def serve(*_: object) -> dict[str, Any]:
        raise torch.OutOfMemoryError("tried to\nallocate")

    monkeypatch.setattr(placement_oom, "serve", serve)
    assert run(0, 2, "cpu", 3)["out_of_memory"] == "tried to allocate"


def test_lines() -> None:
    assert "took 99.0 %, 75.0 % of its part: llama; flashinfer; 50 tokens of prompts, room for 64" in line(SERVED)
    assert "OUT OF MEMORY: phi3: tried 2 GiB" in line(SHORT)
    assert "FAILED: no such model" in line(FAILED)


@pytest.mark.parametrize(("result", "code"), [(SERVED, 0), (SHORT, 1), (FAILED, 1)])
def test_the_exit_code(
    result: dict[str, Any], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(placement_oom, "in_child", lambda *_: result)
    assert main(["--device", "cpu", "--cases", "4"]) == code
    assert f"4 planned and run: {4 * (result is SHORT)} out of memory" in capsys.readouterr().out


def test_nothing_served_proves_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cpu", "--seconds", "0"]) == 1
    assert "0 planned and run" in capsys.readouterr().out
