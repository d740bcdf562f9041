"""`python -m placement`: plans, and one line with exit code 2 for whatever is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from placement.__main__ import main
from placement.export import from_json
from tests.unit.placement.tiny_models import save


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama_tied", tmp_path_factory.mktemp("tiny"))


def test_json_is_a_plan(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(model), "--cpu", "40MB,40MB", "--context", "64", "--json"]) == 0
    plan = from_json(capsys.readouterr().out)
    assert [stage.layers for stage in plan.stages] == [(0, 2), (2, 4)]
    assert plan.max_context == 64


def test_table_and_explanation(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(model), "--cpu", "400MB", "--explain"]) == 0
    out = capsys.readouterr().out
    assert "KV capacity" in out
    assert "hidden states" in out


def test_an_inventory_file_and_caps(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inventory = tmp_path / "gpus.yaml"
    inventory.write_text("gpus: [{name: L4, memory: 24GB, count: 2}]")
    assert main([str(model), "--inventory", str(inventory), "--max-memory", "0=500MB,1=2GB", "--json"]) == 0
    budgets = [stage["budget_bytes"] for stage in json.loads(capsys.readouterr().out)["plan"]["stages"]]
    assert budgets[1] - budgets[0] == 1_500_000_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "3y"], "24GiB"),
        (["--cpu", "10kB"], "does not fit"),
        (["--cpu", "1GB", "--quantization", "int4"], "invalid choice"),
        (["--cpu", "1GB", "--quantization", "int8", "--double-quant"], "double_quant needs nf4 or fp4"),
        (["--cpu", "1GB", "--quantization", "bf16", "--dtype", "float32"], "computes in bfloat16"),
        (["--cpu", "1GB", "--max-memory", "1GB"], "0=600MB"),
        (["--cpu", "1GB", "--context", "100000"], "made for 512"),
        (["--inventory", "/no/such/file"], "can't be read"),
    ],
)
def test_errors_are_one_line(
    model: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main([str(model), *arguments])
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_a_folder_without_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "--cpu", "1GB"]) == 2
    assert "config.json does not exist" in capsys.readouterr().err
    for text, message in (("{", "can't be read"), ("[]", "JSON object"), ('{"model_type": "nonesuch"}', "can't build")):
        (tmp_path / "config.json").write_text(text)
        assert main([str(tmp_path), "--cpu", "1GB"]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    assert main([str(tmp_path), "--cpu", "1GB"]) == 2
    assert "already quantised (gptq)" in capsys.readouterr().err


def test_import_needs_neither_torch_nor_ray() -> None:
    code = "import sys, placement.__main__; print(sorted({'torch', 'ray', 'transformers'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
