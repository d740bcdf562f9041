"""The benchmark of the engine runs on the CPU, and its tables agree; how fast is for the benchmark to say."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from benchmarks.engine_throughput import main


def test_every_concurrency_has_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--input", "9", "--output", "5", "--concurrency", "1,3", "--max-batch-tokens", "64"]
    files = ["--folder", str(tmp_path), "--json", str(tmp_path / "r.json"), "--steps", str(tmp_path / "s.csv")]
    assert main(["--shape", "tiny", "--quantization", "bf16,nf4", *sizes, *files]) == 0
    printed = capsys.readouterr().out
    runs = json.loads((tmp_path / "r.json").read_text())["runs"]
    assert list(runs) == ["bf16", "nf4"]
    for run in runs.values():
        assert [line["concurrency"] for line in run["engine"]] == [1, 3]
        for line in run["engine"]:
            assert line["tokens_per_s"] > 0
            assert line["floor_ms"] > 0
            assert f"{line['tokens_per_s']:8.0f} tokens/s, step {line['step_ms']:6.2f} ms" in printed


def test_steps_add_up_to_all_tokens(tmp_path: Path) -> None:
    sizes = ["--input", "9", "--output", "9", "--concurrency", "3,2", "--max-batch-tokens", "64"]
    main(
        [
            "--shape",
            "tiny",
            "--quantization",
            "bf16,nf4",
            *sizes,
            "--folder",
            str(tmp_path),
            "--steps",
            str(tmp_path / "s.csv"),
        ]
    )
    with (tmp_path / "s.csv").open() as file:
        steps = list(csv.DictReader(file))
    for quantization in ("bf16", "nf4"):
        own = [step for step in steps if step["quantization"] == quantization]
        assert [int(step["tokens"]) for step in own] == [3] * 9, "27 tokens of prompts, then 8 decodes of 3"
        assert [int(step["running"]) for step in own] == [3] * 8 + [0]
        assert all(float(step["ms"]) > 0 for step in own)
