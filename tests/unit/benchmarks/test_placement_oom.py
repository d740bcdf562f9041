"""The benchmark serves what it draws, and says so when something goes wrong."""

from __future__ import annotations

import random
import subprocess
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch

from benchmarks import placement_oom
from benchmarks.placement_oom import draw, in_child, line, main, run, weights_of
from deployments.planning import plan_pool
from deployments.settings import PoolSettings
from placement.hardware import Gpu
from placement.plan import Plan, Stage
from placement.reserve import CONTEXT, GRAPHS, Term, driver_bytes
from tests.unit.placement.tiny_models import save

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


def test_families_with_attention_of_their_own_and_all_that_can_be_quantised_are_drawn() -> None:
    drawn = [draw(random.Random(seed), "cuda", 2) for seed in range(200)]
    assert {case.family for case in drawn} == {*placement_oom.SERVED}
    heads = [case for case in drawn if case.pool.quantize_head]
    embeddings = [case for case in drawn if case.pool.quantize_embeddings]
    assert heads
    assert embeddings
    assert all(case.pool.quantization in ("nf4", "fp4", "int8") for case in heads + embeddings)


def test_the_driver_s_part_is_not_the_allocator_s(tmp_path: Path) -> None:
    """The context, and of the graphs what is outside PyTorch's pool."""
    stage = Stage(
        0, Gpu("NVIDIA H200", 10**11), (0, 16), (), (), 0,
        (Term(CONTEXT, 700, ""), Term(GRAPHS, driver_bytes(16) + 50, ""), Term("buffers", 7, "")), 1, 10**9,
    )  # fmt: skip
    plan = plan_of_tiny(tmp_path)
    assert placement_oom._allowed(replace(plan, stages=(stage,)), stage) == 10**9 - 700 - driver_bytes(16)
    without = replace(stage, reserve=stage.reserve[:1])
    assert placement_oom._allowed(replace(plan, stages=(without,)), without) == 10**9 - 700 - driver_bytes(0)


def plan_of_tiny(folder: Path) -> Plan:
    made = save("llama", folder)
    pool = PoolSettings.model_validate({"device": "cpu", "max_sequences": 16, "max_context": 128})
    return plan_pool("tiny", made, pool)[0]


def test_waves_hold_what_fits_and_gather_more(tmp_path: Path) -> None:
    plan = replace(plan_of_tiny(tmp_path), block_size=4, num_blocks=96, max_context=128)
    longest, batch, prefix, sharing = placement_oom._waves(200, plan, 16)
    assert [len(longest), len(longest[0]), len(prefix)] == [1, 120, 1]
    assert len(batch) == len(sharing) == 16
    (shared,) = prefix
    lengths = [len(prompt) for prompt in sharing]
    assert set(lengths) == {len(shared) + 1, len(shared) // 2 + 1}
    assert all(prompt[:-1] == shared[: len(prompt) - 1] for prompt in sharing)
    assert sum(lengths) > plan.capacity_tokens > len(shared) + 16 * (1 + 8)


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
