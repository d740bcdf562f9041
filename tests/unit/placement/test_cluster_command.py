"""`python -m placement cluster`: inventories and models as people give them, and what is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig

from deployments.config_file import read_config
from placement import probe
from placement.__main__ import main
from placement.hardware import Gpu, Inventory, Node
from tests.unit.placement.tiny_models import CONFIGS


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    CONFIGS["llama"].save_pretrained(folder)
    return folder


@pytest.fixture
def models(model: Path, tmp_path: Path) -> Path:
    path = tmp_path / "models.yaml"
    path.write_text(f"models: [{{name: a, source: {model}, context: 64}}, {{name: b, source: {model}, context: 64}}]")
    return path


def test_one_model_on_nodes_spelt_out(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["cluster", "2xL4+T4", "--model", str(model), "--quantization", "int8,nf4", "--context", "64", "--json"]
    assert main(arguments) == 0
    document = json.loads(capsys.readouterr().out)
    row = document["frontier"][document["chosen"]]
    assert [(pool["gpus"], pool["replicas"]) for pool in row["pools"]] == [(["L4"], 2), (["T4"], 1)]
    assert {pool["quantization"] for pool in row["pools"]} == {"int8"}
    assert [host["node"] for pool in row["pools"] for host in pool["hosts"]] == ["node0", "node0", "node1"]


def test_files_and_an_emitted_config(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inventory, emitted = tmp_path / "nodes.yaml", tmp_path / "serve_config.yaml"
    inventory.write_text("nodes: [{name: x, gpus: [{name: L4, count: 2}]}, {name: y, gpus: [{name: L4, count: 2}]}]")
    assert main(["cluster", str(inventory), str(models), "--emit", str(emitted), "--pin-nodes"]) == 0
    out = capsys.readouterr().out
    assert "node x: ray start --resources=" in out
    served = read_config(emitted).config.application.args.models
    assert [model.name for model in served] == ["a", "b"]
    assert sum(pool.replicas for model in served for pool in model.pools) == 4
    assert {pool.accelerator_type for model in served for pool in model.pools} == {"L4"}


def test_another_row_can_be_picked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32}
    LlamaConfig(**wide, num_hidden_layers=16, num_key_value_heads=8, max_position_embeddings=8192).save_pretrained(
        tmp_path
    )
    base = ["cluster", "4xL4", "--model", str(tmp_path), "--quantization", "bf16,nf4", "--context", "4096"]
    assert main([*base, "--json"]) == 0
    rows = len(json.loads(capsys.readouterr().out)["frontier"])
    assert rows > 1
    assert main([*base, "--json", "--pick", str(rows), "--emit", str(tmp_path / "c.yaml")]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["chosen"] == rows - 1
    row = document["frontier"][rows - 1]
    (pool,) = read_config(tmp_path / "c.yaml").config.application.args.models[0].pools
    assert pool.quantization == row["pools"][0]["quantization"] == "nf4"


def test_this_machine_and_a_ray_cluster(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = {"local": "inventory", "ray": "ray_inventory"}
    for word, function in asked.items():
        found = Inventory((Node(f"the-{word}", (Gpu.of("NVIDIA L4"),) * 2),))
        monkeypatch.setattr(probe, function, lambda found=found: found)
        assert main(["cluster", word, str(models)]) == 0
        assert f"the-{word}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["L4"], "a file of them, or one with --model"),
        (["L4", "MODELS", "--model", "x"], "a file of them, or one with --model"),
        (["L4", "MODELS", "--context", "64"], "context can't be given beside a file"),
        (["L4", "/no/such/models.yaml"], "models /no/such/models.yaml can't be read"),
        (["/no/such/nodes.yaml", "MODELS"], "inventory /no/such/nodes.yaml can't be read"),
        (["2xH900", "MODELS"], "neither a size"),
        (["L4", "MODELS"], "beside the other models"),
        (["2xL4", "MODELS", "--pick", "99"], "the frontier has rows 1 to"),
        (["2xL4", "MODELS", "--emit", "/no/such/folder/c.yaml"], "can't be written"),
        (["L4", "--model", "MODEL", "--quantization", "int4"], "'int4' is not known"),
        (["L4", "--model", "MODEL", "--context", "0"], "context must be"),
        (["L4", "--model", "MODEL", "--context", "4096"], "made for 512"),
        (["L4", "--model", "/no/such/model"], "does not exist"),
        (["L4", "--model", "MODEL", "--min-concurrency", "9999"], "9999 sequences of 512 tokens are wished for"),
        (["L4", "--model", "MODEL", "--goal", "speed"], "invalid choice"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], message: str, model: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [{"MODEL": str(model), "MODELS": str(models)}.get(word, word) for word in arguments]
    try:
        code = main(["cluster", *given])
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert captured.err.startswith("placement cluster: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
