"""The benchmark of time between tokens runs on the CPU; how long is for the benchmark to say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.inter_token import main

SIZES = ["--shape", "tiny", "--quantization", "fp16", "--streams", "2", "--input", "5", "--max-batch-tokens", "64"]


def test_gaps_are_counted_while_prompts_arrive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = tmp_path / "found.json"
    arrivals = ["--output", "40", "--prompts", "2", "--prompt", "200"]
    assert main([*SIZES, *arrivals, "--folder", str(tmp_path), "--json", str(found)]) == 0

    results = json.loads(found.read_text())
    assert results["alone"]["tokens"] == 2 * 39, "all but each stream's first token end a gap"
    assert 0 < results["busy"]["tokens"] <= 2 * 39
    assert len(results["first_token_s"]) == 2
    for gaps in (results["alone"], results["busy"]):
        assert 0 < gaps["p50_ms"] <= gaps["p99_ms"] <= gaps["max_ms"]
    assert "2 streams, 2 prompts of 200 tokens: p50" in capsys.readouterr().out


def test_streams_that_end_too_early_are_told(tmp_path: Path) -> None:
    arrivals = ["--output", "3", "--prompts", "3", "--prompt", "200"]
    with pytest.raises(RuntimeError, match="raise --output or lower --prompts"):
        main([*SIZES, *arrivals, "--folder", str(tmp_path)])
