"""The command runs, prints every policy, writes its files, and reads a trace; what it finds is for it to say."""

from __future__ import annotations

import json
import math
import random
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks.routing.front import Limits
from benchmarks.routing.study import POLICIES, Setting, study
from benchmarks.routing.table import plot
from benchmarks.routing.workload import trace
from benchmarks.routing_sim import main

ROWS = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:51.2224670,879,55
"""


def test_the_command_compares_all_policies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--quick", "--no-sustained", "--fleets", "unequal", "--workloads", "poisson"]
    main([*arguments, "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert all(policy in printed for policy in POLICIES)
    assert "TTFT p99 at 0.9" in printed
    found = json.loads((tmp_path / "routing-unequal-poisson.json").read_text(encoding="utf-8"))
    assert {(o["policy"], o["load"]) for o in found["outcomes"]} == {(p, load) for p in POLICIES for load in (0.5, 0.9)}
    assert "<svg" in (tmp_path / "routing-unequal-poisson.svg").read_text(encoding="utf-8")


def test_the_ledger_alone_in_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--quick", "--no-sustained", "--fleets", "equal", "--workloads", "poisson", "--others"]
    main([*arguments, "--ledgers", "4", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "4 ledgers" in printed
    assert "random" not in printed
    assert "goal" not in printed
    found = json.loads((tmp_path / "routing-equal-poisson.json").read_text(encoding="utf-8"))
    assert {o["policy"] for o in found["outcomes"]} == {"ledger"}


def test_curves_of_nothing_finite_are_empty(tmp_path: Path) -> None:
    limits = Limits(queue_per_replica=0)
    setting = Setting("equal", "poisson", None, 100, limits)
    refused = study(setting, loads=[30.0], seeds=2, limit=None)
    assert math.isinf(refused.p99("random", 30.0).high)
    plot(refused, tmp_path / "empty.svg")
    assert "<svg" in (tmp_path / "empty.svg").read_text(encoding="utf-8")


def test_a_trace_keeps_its_lengths_and_order_and_is_scaled_to_the_rate(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text(ROWS, encoding="utf-8")
    jobs = trace(file)(10.0, 300, random.Random(0))
    lengths = [(374, 44), (396, 109), (879, 55)]
    start = lengths.index((jobs[0].prompt, jobs[0].output))
    assert [(job.prompt, job.output) for job in jobs] == [lengths[(start + i) % 3] for i in range(300)]
    assert all(a.arrival <= b.arrival for a, b in pairwise(jobs))


def test_another_file_is_refused_by_its_columns(tmp_path: Path) -> None:
    file = tmp_path / "other.csv"
    file.write_text("a,b\n1,2\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"TIMESTAMP,ContextTokens,GeneratedTokens.*\['a', 'b'\]"):
        trace(file)


def test_the_trace_workload_asks_for_its_file(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--workloads", "trace"])
    assert "--trace FILE" in capsys.readouterr().err
