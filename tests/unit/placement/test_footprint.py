"""The formulas by hand, and what `footprint` refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from placement.errors import PlacementError
from placement.footprint import footprint
from tests.unit.placement.tiny_models import CONFIGS, save


def test_at_another_quantisation_equals_a_footprint_built_there(tmp_path: Path) -> None:
    folder = save("llama_tied", tmp_path)
    wide = footprint(folder, quantization="bf16", name="tiny")
    for quantization, double_quant in (("nf4", True), ("int8", False)):
        built = footprint(folder, quantization=quantization, double_quant=double_quant, dtype="bfloat16", name="tiny")
        assert wide.at(quantization, double_quant=double_quant) == built
    with pytest.raises(PlacementError, match="may change the dtype"):
        wide.at("fp32")


def test_ties_are_counted_once_per_device(tmp_path: Path) -> None:
    weighed = footprint(save("llama_tied", tmp_path), quantization="bf16")
    modules = {module.name: module for module in weighed.modules}
    assert modules["lm_head"].bytes == modules["model.embed_tokens"].bytes == 200 * 72 * 2
    assert weighed.bytes == sum(module.bytes for module in weighed.modules) - 200 * 72 * 2


def test_a_module_of_unknown_place_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    CONFIGS["llama"].save_pretrained(tmp_path)
    build = LlamaForCausalLM.__init__

    def with_stranger(self: LlamaForCausalLM, *args: object, **kwargs: object) -> None:
        build(self, *args, **kwargs)
        self.stranger = nn.Linear(2, 2)

    monkeypatch.setattr(LlamaForCausalLM, "__init__", with_stranger)
    with pytest.raises(PlacementError, match=r"module stranger \(Linear\) has no known place"):
        footprint(tmp_path)


def test_a_config_that_contradicts_the_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    CONFIGS["qwen3"].save_pretrained(tmp_path)
    monkeypatch.setattr("placement.skeleton.layer_kv", lambda config: _half_the_heads(config))
    with pytest.raises(PlacementError, match="projects keys to 64, the config says 1 heads of 32"):
        footprint(tmp_path)


def _half_the_heads(config: dict[str, object]) -> object:
    from placement.kv import layer_kv

    return layer_kv({**config, "num_key_value_heads": 1})


def test_no_weights_are_read(tmp_path: Path) -> None:
    CONFIGS["llama"].save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    # 126 layers of a 405B model: far more than this machine could hold.
    config |= {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "vocab_size": 128256}
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_attention_heads": 128, "head_dim": 128}))
    assert footprint(tmp_path, quantization="bf16").bytes > 600 * 10**9
    assert torch.get_default_dtype() == torch.float32
