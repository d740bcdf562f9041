"""Times of products as tables, goals and a picture."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks.gemm_report import Point, goals, main, report
from benchmarks.gemm_report import Points as Lookup

POINTS = [
    Point("8B", "qkv", "bf16", "cublas", 16, 16.0, 12.0),
    Point("8B", "qkv", "bf16", "cublas", 128, 17.0, 12.5),
    Point("8B", "qkv", "4bit", "headroom", 16, 8.0, 4.0),
    Point("8B", "qkv", "4bit", "headroom", 128, 19.0, 5.0),
    Point("8B", "qkv", "4bit", "bitsandbytes", 16, 32.0, 4.0),
    Point("8B", "qkv", "4bit", "bitsandbytes", 128, 40.0, 5.0),
    Point("1B", "o", "4bit", "headroom", 16, 3.0, 1.0),
    Point("8B", "qkv", "8bit", "headroom", 16, 10.0, 9.0),
]


def test_a_table_for_each_model_and_kind_of_weight() -> None:
    lines = report(POINTS)
    assert "| 8B, NF4 | qkv 6144x4096 |" in lines
    assert "| M = 16 | 8.0 (50%; 0.50, 0.25) |" in lines
    assert "| M = 128 | 19.0 (26%; 1.12, 0.47) |" in lines
    assert "| M = 16 | 10.0 (90%; 0.62) |" in lines, "what was not measured is not compared with"
    assert lines.index("| 1B, NF4 | o 2048x2048 |") < lines.index("| 8B, NF4 | qkv 6144x4096 |")


def test_what_misses_a_goal_is_named() -> None:
    more = [
        Point("8B", "gate_up", "4bit", "headroom", 1, 30.0, 15.0),
        Point("8B", "gate_up", "4bit", "headroom", 16, 27.0, 16.0),
        Point("8B", "gate_up", "4bit", "headroom", 32, 40.0, 16.0),
        Point("8B", "gate_up", "4bit", "bitsandbytes", 32, 20.0, 16.0),
        Point("8B", "down", "8bit", "headroom", 8, 20.0, 14.0),
    ]
    few, few8, cublas, cublas8, theirs = goals(Lookup([*POINTS, *more]))
    large = "linears of 50 million weights and more"
    assert few == (
        f"MISSED by 1 of 2: NF4, at least 55% of the floor up to 16 rows, {large}: 8B gate_up at 1 row (50.0%)"
    ), "neither small linears nor more rows"
    assert few8 == (
        "MISSED by 1 of 2: int8, at least 75% of the floor up to 16 rows, linears of any size: "
        "8B down at 8 rows (70.0%)"
    )
    assert cublas == "MISSED by 1 of 2: NF4, never slower than cublas up to 128 rows: 8B qkv at 128 rows (1.12)"
    assert cublas8 == "met by all 1: int8, never slower than cublas up to 128 rows"
    assert theirs == "MISSED by 1 of 3: NF4, never slower than bitsandbytes: 8B gate_up at 32 rows (2.00)"


def test_what_was_not_measured_is_not_met() -> None:
    assert all(line.startswith("not measured: ") for line in goals(Lookup([])))


def test_files_become_one_report_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = []
    for model in ("8B", "1B"):
        files.append(tmp_path / f"{model}.json")
        mine = [asdict(point) for point in POINTS if point.model == model]
        files[-1].write_text(json.dumps({"bandwidth": 4e12, "points": mine}))
    picture = tmp_path / "roofline.svg"
    assert main([*map(str, files), "--plot", str(picture)]) == 0
    assert capsys.readouterr().out == "\n".join(report(POINTS)) + "\n"
    drawn = picture.read_text()
    for name in ("8B qkv 6144x4096", "1B o 2048x2048", "NF4 headroom", "bf16 cublas"):
        assert name in drawn
    assert main([*map(str, files), "--plot", str(picture)]) == 0
    assert picture.read_text() == drawn, "nothing in it changes by itself"
