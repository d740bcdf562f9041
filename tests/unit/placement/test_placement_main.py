"""`python -m placement`: plans, and one line with exit code 2 for whatever is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from placement.__main__ import main
from placement.export import from_json
from placement.svg import svg
from tests.unit.placement.tiny_models import save

LLAMA_8B = Path(__file__).parents[2] / "configs" / "llama-8b"


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


def test_a_quantised_head_is_planned_beside_its_embedding(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = {}
    for options in ((), ("--quantize-head",)):
        assert main([str(model), "--cpu", "400MB", "--context", "64", "--json", *options]) == 0
        (stage,) = from_json(capsys.readouterr().out).stages
        held[options] = {term.name: term.bytes for term in stage.weights}
    plain, head = held.values()
    assert plain["embedding"] == head["embedding"]
    assert "head" in head
    assert head["head"] > plain.get("head", 0)
    assert main([str(model), "--cpu", "400MB", "--context", "64", "--quantize-head"]) == 0
    assert "nf4, the head too, computes in" in capsys.readouterr().out


def test_attention_changes_the_reserve_on_gpus_alone(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Its heads are of 32: by default no FlashInfer.
    assert main([str(model), "--gpus", "L4"]) == 0
    default = capsys.readouterr().out
    assert main([str(model), "--gpus", "L4", "--attention", "torch"]) == 0
    assert capsys.readouterr().out == default
    assert "graphs" not in default
    assert main([str(LLAMA_8B), "--gpus", "H100"]) == 0
    default = capsys.readouterr().out
    assert "graphs" in default
    assert main([str(LLAMA_8B), "--gpus", "H100", "--attention", "flashinfer"]) == 0
    assert capsys.readouterr().out == default
    assert main([str(LLAMA_8B), "--gpus", "H100", "--attention", "torch"]) == 0
    assert "graphs" not in capsys.readouterr().out


def test_gpus_without_flashinfer_are_planned_without_it(capsys: pytest.CaptureFixture[str]) -> None:
    for gpus in ("T4", "V100-32GB", "MI300X", "1xL4,1xT4"):
        assert main([str(LLAMA_8B), "--gpus", gpus, "--context", "512"]) == 0
        assert "graphs" not in capsys.readouterr().out
    assert main([str(LLAMA_8B), "--gpus", "1xL4,1xT4", "--attention", "flashinfer"]) == 2
    assert "attention flashinfer does not run on T4; use torch" in capsys.readouterr().err


def test_named_gpus_come_with_an_estimate(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(model), "--gpus", "L4"]) == 0
    out = capsys.readouterr().out
    assert "0: L4" in out
    assert "estimated tokens/s: " in out.splitlines()[-1]
    assert main([str(model), "--cpu", "1GB"]) == 0
    assert "estimated" not in capsys.readouterr().out


def test_fused_experts_are_quantised_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    base = [str(LLAMA_8B.parent / "mixtral-8x7b"), "--cpu", "200GB", "--json"]
    assert main(base) == 0
    before = from_json(capsys.readouterr().out)
    assert main([*base, "--quantize-experts"]) == 0
    after = from_json(capsys.readouterr().out)
    assert (before.experts, after.experts) == (False, True)
    assert 3 * after.stages[0].weight_bytes < before.stages[0].weight_bytes


def test_devices_left_empty_are_named(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(model), "--cpu", "1GB,1GB,1GB", "--goal", "latency"]) == 0
    assert "nothing is placed on device 1, 2" in capsys.readouterr().out
    assert main([str(model), "--cpu", "1GB"]) == 0
    assert "nothing is placed" not in capsys.readouterr().out


def test_the_picture_is_written(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "plan.svg"
    assert main([str(model), "--cpu", "400MB", "--context", "64", "--json", "--svg", str(picture)]) == 0
    assert picture.read_text() == svg(from_json(capsys.readouterr().out))


def test_demands_and_pins_reach_the_solver(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = [str(model), "--cpu", "40MB,40MB", "--context", "64", "--json"]
    assert main([*base, "--pin", "model.layers.0=0", "--pin", "model.layers.1=1"]) == 0
    assert [stage.layers for stage in from_json(capsys.readouterr().out).stages] == [(0, 1), (1, 4)]
    assert main([*base, "--kv-dtype", "fp8", "--block-size", "8", "--goal", "latency"]) == 0
    plan = from_json(capsys.readouterr().out)
    assert (plan.kv_dtype, plan.block_size, len(plan.stages)) == ("float8_e4m3fn", 8, 1)
    assert main([*base, "--max-sequences", "2", "--min-concurrency", "3"]) == 2
    assert "max_sequences" in capsys.readouterr().err


def test_a_context_that_is_asked_for_must_fit(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # With one sequence at a time there is room for some of its 512 tokens, so less may be asked for.
    base = [str(model), "--cpu", _tight(model, capsys), "--max-sequences", "1", "--max-batch-tokens", "16", "--json"]
    assert main([*base, "--context", "512"]) == 2
    assert "does not fit" in capsys.readouterr().err
    assert main([*base, "--context", "512", "--min-context", "16"]) == 0
    assert 16 <= from_json(capsys.readouterr().out).max_context < 512


def _tight(model: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """A size with room for 256 tokens and not for 512."""
    assert main([str(model), "--cpu", "1GB", "--max-sequences", "1", "--max-batch-tokens", "16", "--json"]) == 0
    plan = from_json(capsys.readouterr().out)
    (stage,) = plan.stages
    block = stage.kv_block_bytes
    return f"{stage.weight_bytes + stage.reserve_bytes + (plan.num_blocks // 2 + 1) * block}B"


def test_an_inventory_file_and_caps(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inventory = tmp_path / "gpus.yaml"
    inventory.write_text("gpus: [{name: L4, memory: 24GB, count: 2}]")
    assert main([str(model), "--inventory", str(inventory), "--max-memory", "0=1GB,1=2.5GB", "--json"]) == 0
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
        (["--cpu", "1GB", "--context", "0"], "max_context is 0"),
        (["--cpu", "1GB", "--quantize-experts"], "has no fused experts to quantise; leave quantize_experts out"),
        (["--cpu", "1GB", "--min-context", "0"], "min_context is 0"),
        (["--inventory", "/no/such/file"], "can't be read"),
        (["--gpus", "2xH900"], "neither a size such as 24GiB nor one of"),
        (["--cpu", "1GB", "--max-memory", "0=1GB,0=2GB"], "given twice"),
        (["--cpu", "1GB", "--pin", "lm_head"], "write module=device"),
        (["--cpu", "1GB", "--pin", "lm_head=0", "--pin", "lm_head=0"], "pinned twice"),
        (["--cpu", "1GB", "--pin", "lm_haed=0"], "lm_head"),
        (["--cpu", "1GB", "--kv-dtype", "fp9"], "fp9"),
        (["--cpu", "1GB", "--attention", "sdpa"], "invalid choice"),
        (["--cpu", "1GB", "--attention", "flashinfer"], "attention flashinfer needs a GPU"),
        (["--gpus", "L4", "--attention", "flashinfer"], "does not serve"),
        (["--cpu", "1GB", "--svg", "/no/such/folder/plan.svg"], "can't be written"),
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


def test_a_name_that_is_nowhere(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for name in ("no-such-org/no-such-model", str(tmp_path / "none"), str(tmp_path / "none.gguf")):
        assert main([name, "--cpu", "1GB"]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_a_folder_without_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "--cpu", "1GB"]) == 2
    assert "config.json does not exist" in capsys.readouterr().err
    wrong = (("{", "can't be read"), ("[]", "JSON object"), ('{"model_type": "nonesuch"}', "no model_type nonesuch"))
    for text, message in wrong:
        (tmp_path / "config.json").write_text(text)
        assert main([str(tmp_path), "--cpu", "1GB"]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_import_needs_neither_torch_nor_ray() -> None:
    code = "import sys, placement.__main__; print(sorted({'torch', 'ray', 'transformers'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
