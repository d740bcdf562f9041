"""`headroom quantize`: the checkpoint it writes is transformers' own, and is served as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import modules as bitsandbytes
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from deployments.cli import main
from deployments.engine.loader import load
from deployments.planning import plan_pool
from deployments.settings import PoolSettings
from tests.contract.families import CONFIGS
from tests.contract.greedy import LIMITS, answers, generated, make_prompts, run, save


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save(CONFIGS["Llama"], tmp_path_factory.mktemp("llama"))
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    (folder / "tokenizer.json").write_text("{}")
    return folder


def pool() -> PoolSettings:
    small = {"device": "cpu", "block_size": 4, "max_sequences": 16, "max_batch_tokens": 256, "max_context": 64}
    return PoolSettings.model_validate(small | {"cpu_device_memory": "60MB"})


def test_it_writes_what_transformers_writes(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", str(model), str(tmp_path / "ours"), "--device", "cpu", "--dtype", "float32"]) == 0
    assert f"serve it with `source: {tmp_path / 'ours'}`" in capsys.readouterr().err
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, quantization_config=config)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, expected = (load_file(tmp_path / side / "model.safetensors") for side in ("ours", "theirs"))
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[key], tensor) for key, tensor in expected.items())
    assert (tmp_path / "ours" / "tokenizer_config.json").read_text() == (model / "tokenizer_config.json").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "theirs"]


def test_it_is_served_as_it_is_the_head_too(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "quantised"
    options = ["--device", "cpu", "--dtype", "float32", "--double-quant", "--quantize-head"]
    assert main(["quantize", str(model), str(folder), *options]) == 0
    prompts = make_prompts()
    oracle = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(oracle.get_output_embeddings(), bitsandbytes.Linear4bit)
    outputs = generated(oracle, prompts)
    plan, _ = plan_pool("tiny", folder, pool())
    found, _ = run(load(folder, plan, device_type="cpu"), plan, LIMITS, prompts)
    assert found == answers(outputs)


def test_experts_that_stay_as_they_are_are_told_of(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixtral = save(CONFIGS["Mixtral"], tmp_path / "mixtral")
    for name in ("tokenizer.json", "tf_model.h5"):
        (mixtral / name).write_text("{}")
    assert main(["quantize", str(mixtral), str(tmp_path / "done"), "--device", "cpu", "--dtype", "float32"]) == 0
    said = capsys.readouterr().err
    assert "are fused and stay in float32" in said
    assert "`quantize_experts: true`" in said
    assert not (tmp_path / "done" / "tf_model.h5").exists()
    assert main(["quantize", str(model), str(tmp_path / "plain"), "--device", "cpu"]) == 0
    assert "are fused" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--quantization", "int8", "--double-quant"], "--double-quant is for nf4 and fp4"),
        (["--device", "cuda"], "--device cuda: no CUDA device is visible"),
    ],
)
def test_refusals(
    options: list[str], message: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", str(model), str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_there_and_one_that_is_quantised_are_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = tmp_path / "done"
    assert main(["quantize", str(model), str(done), "--device", "cpu", "--quantization", "int8"]) == 0
    assert main(["quantize", str(model), str(done), "--device", "cpu"]) == 2
    assert "is there already; name a folder that isn't" in capsys.readouterr().err
    assert main(["quantize", str(done), str(tmp_path / "twice"), "--device", "cpu"]) == 2
    assert "is quantised already; give the unquantised model" in capsys.readouterr().err
