"""The benchmark of the engine runs on the CPU, and its tables agree; how fast is for the benchmark to say."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from benchmarks.engine_throughput import main


def test_its_tables_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, timeline = tmp_path / "found.json", tmp_path / "steps.csv"
    sizes = ["--input", "9", "--output", "9", "--concurrency", "3,1", "--max-batch-tokens", "64"]
    files = ["--folder", str(tmp_path), "--json", str(found), "--steps", str(timeline)]
    assert main(["--shape", "tiny", "--quantization", "bf16,fp16,bf16+invariant", *sizes, *files]) == 0

    printed = capsys.readouterr().out
    runs = json.loads(found.read_text())["runs"]
    assert list(runs) == ["bf16", "fp16", "bf16+invariant"]
    assert printed.count("attention by torch, batch-invariant") == 1
    for run in runs.values():
        assert [line["concurrency"] for line in run["engine"]] == [3, 1]
        assert run["stages"] == [[], []], "those of GPUs alone are timed"
        for line in run["engine"]:
            assert min(line["tokens_per_s"], line["floor_ms"]) > 0
            assert f"{line['tokens_per_s']:8.0f} tokens/s, step {line['step_ms']:6.2f} ms" in printed

    with timeline.open() as file:
        steps = list(csv.DictReader(file))
    for quantization in runs:
        own = [step for step in steps if step["quantization"] == quantization]
        assert [int(step["tokens"]) for step in own] == [3] * 9, "27 tokens of prompts, then 8 decodes of 3"
        assert [int(step["running"]) for step in own] == [3] * 8 + [0]
        assert all(float(step["ms"]) > 0 for step in own)


def test_a_way_of_serving_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"nf4\+inva: \+inva is unknown; there are \+dq, \+experts and \+invariant"):
        main(["--shape", "tiny", "--quantization", "nf4+inva", "--folder", str(tmp_path)])


def test_double_quantised_weights_are_fewer_bytes(tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    sizes = ["--input", "4", "--output", "4", "--concurrency", "1", "--max-batch-tokens", "64"]
    asked = ["--shape", "tiny", "--quantization", "nf4,nf4+dq", "--folder", str(tmp_path), "--json", str(found)]
    assert main([*asked, *sizes]) == 0
    floors = {name: run["engine"][0]["floor_ms"] for name, run in json.loads(found.read_text())["runs"].items()}
    assert 0.8 * floors["nf4"] < floors["nf4+dq"] < floors["nf4"]
