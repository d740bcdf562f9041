"""The sweep agrees with what loads, and would say so if it did not."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.placement_sweep import Case, differences, draw, main, plan_of
from placement.errors import DoesNotFit
from placement.plan import Plan


def placed(folder: Path) -> tuple[Case, Plan]:
    """The first case that fits on several devices."""
    rng = random.Random(1)
    while True:
        case = draw(rng)
        try:
            plan = plan_of(case, folder)
        except DoesNotFit:
            continue
        if len(plan.stages) > 1:
            return case, plan


def test_cases_agree(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--cases", "8", "--seed", "5"]) == 0
    cases, verdict = capsys.readouterr().out.splitlines()
    assert cases.startswith("seed 5: 8 cases, ")
    count = cases.split(", ")[2].split()[0]
    assert int(count) > 0
    assert verdict == f"{count} of {count} hold what was planned to the byte, within their budgets"


def test_equal_seeds_draw_equal_cases() -> None:
    assert str(draw(random.Random(9))) == str(draw(random.Random(9))) != str(draw(random.Random(8)))


def test_a_plan_that_is_off_by_a_byte_is_found(tmp_path: Path) -> None:
    case, plan = placed(tmp_path)
    assert differences(case, plan, tmp_path) == []
    first, *others = plan.stages
    wrong = replace(first, weight_bytes=first.weight_bytes + 1, kv_block_bytes=first.kv_block_bytes + 1)
    found = differences(case, replace(plan, stages=(wrong, *others)), tmp_path)
    assert [line.split(" ")[:3] for line in found] == [["stage", "0:", "weights"], ["stage", "0:", "KV"]]
    assert f"planned {first.weight_bytes + 1:,}" in found[0]
    tight = replace(first, budget_bytes=first.weight_bytes)
    (line,) = differences(case, replace(plan, stages=(tight, *others)), tmp_path)
    assert line.endswith(f" of {first.weight_bytes:,}")
