"""Local model folders: what is accepted, and what each defect says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from deployments.checkpoint import INDEX, check_checkpoint, has_chat_template, max_context, shards
from deployments.errors import ConfigError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder whose weights the safetensors library wrote."""
    config = {"model_type": "llama", "max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    save_file({"a": torch.zeros(3, 5), "b": torch.ones(7)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


def test_whole_folder_passes(folder: Path) -> None:
    check_checkpoint(folder)
    assert shards(folder) == [folder / "model.safetensors"]


@pytest.mark.parametrize("kept", [0, 4, 20, 100])
def test_weights_cut_short_are_noticed(folder: Path, kept: int) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(ConfigError, match=r"model\.safetensors .*fetch the model again"):
        check_checkpoint(folder)


def test_last_byte_missing_is_noticed(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ConfigError, match="its header needs"):
        check_checkpoint(folder)


def test_shard_that_the_index_names_must_exist(folder: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"lacks 1 of 2 weight files, model-2\.safetensors first"):
        check_checkpoint(folder)


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        ("config.json", "no config.json"),
        ("tokenizer.json", "no tokenizer"),
        ("model.safetensors", "no weights at all"),
    ],
)
def test_missing_part_is_named(folder: Path, missing: str, says: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(ConfigError, match=says):
        check_checkpoint(folder)


def test_pickles_are_not_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"only pytorch_model\.bin"):
        check_checkpoint(folder)


def test_config_that_is_not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"config\.json can't be read"):
        check_checkpoint(folder)


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        ({"max_position_embeddings": 64}, 64),
        ({"n_positions": 1024}, 1024),
        ({"text_config": {"max_position_embeddings": 32}}, 32),
        ({"is_encoder_decoder": True, "relative_attention_num_buckets": 32}, 512),
        ({"is_encoder_decoder": True, "relative_attention_num_buckets": 32, "n_positions": 64}, 64),
    ],
)
def test_longest_context(folder: Path, config: dict[str, object], tokens: int) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "x", **config}), encoding="utf-8")
    assert max_context(folder) == tokens


def test_unknown_context_names_the_key(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "x"}', encoding="utf-8")
    with pytest.raises(ConfigError, match="max_position_embeddings"):
        max_context(folder)


def test_chat_template_is_found_in_either_place(folder: Path) -> None:
    assert not has_chat_template(folder)
    (folder / "tokenizer_config.json").write_text('{"chat_template": "x"}', encoding="utf-8")
    assert has_chat_template(folder)
    (folder / "tokenizer_config.json").unlink()
    (folder / "chat_template.jinja").write_text("x", encoding="utf-8")
    assert has_chat_template(folder)
