"""GPTQ and AWQ checkpoints made plain: the very weights that their codes stand for, and a checkpoint like any other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from deployments.checkpoint import INDEX
from deployments.dequantize import dequantize, main
from deployments.engine.loader import load
from deployments.errors import ConfigError
from deployments.planning import plan_pool
from tests.contract.greedy import LIMITS, answers, generated, make_prompts, run
from tests.contract.grouped import CASES, Grouping, checkpoint
from tests.contract.test_grouped_checkpoints import CONFIGS, NAMES, pool

PROMPTS = make_prompts()


def in_two_files(folder: Path) -> None:
    """The checkpoint split so that every linear has its parts in both files."""
    whole = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(sorted(whole))}
    for file in set(places.values()):
        save_file({name: whole[name] for name in whole if places[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))


@pytest.mark.parametrize(("name", "grouping"), CASES, ids=NAMES)
def test_the_weights_are_those_that_the_codes_stand_for(name: str, grouping: Grouping, tmp_path: Path) -> None:
    folder, plain = checkpoint(CONFIGS[name], grouping, tmp_path)
    made = load_file(dequantize(folder, tmp_path / "made") / "model.safetensors")
    expected = load_file(plain / "model.safetensors")
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[key], expected[key]) and made[key].dtype == expected[key].dtype for key in made)
    configs = [json.loads((place / "config.json").read_text()) for place in (tmp_path / "made", plain)]
    assert configs[0] == configs[1]


def test_it_is_served_quantised_as_any_other(tmp_path: Path) -> None:
    folder, plain = checkpoint(CONFIGS["Llama"], Grouping(act_order=True), tmp_path)
    in_two_files(folder)
    (folder / "tokenizer.json").write_text("{}")
    made = dequantize(folder, tmp_path / "made")
    assert sorted(path.name for path in made.iterdir()) == [
        "config.json", INDEX, "part-0.safetensors", "part-1.safetensors", "tokenizer.json"
    ]  # fmt: skip
    outputs = generated(AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32), PROMPTS)
    plan, _ = plan_pool("tiny", made, pool(quantization="fp32", stages=2))
    tokens, _ = run(load(made, plan, device_type="cpu"), plan, LIMITS, PROMPTS)
    assert tokens == answers(outputs)
    assert plan_pool("tiny", made, pool(quantization="nf4"))[0].quantization == "nf4"


def test_a_lone_file_gets_the_name_that_transformers_looks_for(tmp_path: Path) -> None:
    folder, plain = checkpoint(CONFIGS["Llama"], Grouping(), tmp_path)
    (folder / "model.safetensors").rename(folder / "gptq_model-4bit-128g.safetensors")
    for name in ("tokenizer.json", "LICENSE", "tf_model.h5", "flax_model.msgpack", "rust_model.ot", "model.onnx"):
        (folder / name).write_text("{}")
    made = dequantize(folder, tmp_path / "made")
    files = ["LICENSE", "config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(path.name for path in made.iterdir()) == files
    expected = AutoModelForCausalLM.from_pretrained(plain).state_dict()
    found = AutoModelForCausalLM.from_pretrained(made).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert not list(tmp_path.glob("*.lock")), "nothing else is left in the user's folder"


def test_what_cannot_be_made_plain_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, plain = checkpoint(CONFIGS["Llama"], Grouping(), tmp_path)
    with pytest.raises(ConfigError, match="is not quantised by GPTQ or AWQ"):
        dequantize(plain, tmp_path / "made")
    with pytest.raises(ConfigError, match="is there already"):
        dequantize(folder, plain)
    file = folder / "model.safetensors"
    whole = load_file(file)
    save_file({name: whole[name] for name in whole if not name.endswith("layers.1.mlp.up_proj.g_idx")}, file)
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.up_proj has no g_idx beside its qweight"):
        dequantize(folder, tmp_path / "made")
    save_file(whole | {"model.layers.0.mlp.act.scales": torch.ones(4)}, file)
    assert main(["dequantize", str(folder), str(tmp_path / "made")]) == 2
    assert "act.scales scales no linear but an activation" in capsys.readouterr().err
    assert not (tmp_path / "made").exists()
    save_file(whole, file)
    assert main(["dequantize", str(folder), str(tmp_path / "made")]) == 0
    assert main(["dequantize"]) == 2
