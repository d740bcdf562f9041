"""Where a footprint is read from, what is counted once, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quantize
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaForCausalLM

from placement.errors import PlacementError
from placement.footprint import Footprint, footprint
from placement.recipe import Grouped
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


def write_config(folder: Path, **changes: Any) -> Path:
    """The config.json of a small Llama whose widths GPTQ and AWQ can pack."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 100,
        "max_position_embeddings": 128,
    }
    path = folder / "config.json"
    path.write_text(json.dumps(config | changes))
    return path


def test_a_config_alone_a_folder_and_a_cached_id_say_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0" * 40
    cache = tmp_path / "models--org--tiny"
    path = write_config(cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    by_id = footprint("org/tiny")
    assert by_id.model == "org/tiny"
    assert footprint(path, name="org/tiny") == footprint(str(path.parent), name="org/tiny") == by_id


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("org/absent", "fetch it once: hf download org/absent config.json"),
        ("./absent", "does not exist; give a folder"),
        ("absent.gguf", "does not exist; give a folder"),
        ("a b", "does not exist; give a folder"),
        ("a..b", "fetch it once"),
    ],
)
def test_models_that_are_not_there(model: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PlacementError, match=message) as caught:
        footprint(model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "can't be read"),
        ("[]", "must hold a JSON object"),
        ("{}", "knows no model_type None"),
        ('{"model_type": "rocket"}', "knows no model_type rocket"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "can't build"),
        ('{"model_type": "llama", "quantization_config": 3}', "must be a JSON object"),
        ('{"model_type": "mamba"}', "no attention layers"),
    ],
)
def test_configs_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(PlacementError, match=message) as caught:
        footprint(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_text_model_has_no_tower_to_count(tmp_path: Path) -> None:
    with pytest.raises(PlacementError, match="no vision or audio tower to count"):
        footprint(write_config(tmp_path), vision=True)


def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path) -> None:
    write_config(tmp_path)
    save_file({"model.embed_tokens.weight": torch.zeros(104, 64)}, tmp_path / "model.safetensors")
    with pytest.raises(
        PlacementError, match=r"embed_tokens.weight is \[104, 64\] in model.safetensors, and \[100, 64\]"
    ):
        footprint(tmp_path)


def test_work_counts_the_experts_that_a_token_visits(tmp_path: Path) -> None:
    CONFIGS["mixtral"].save_pretrained(tmp_path)
    layer = footprint(tmp_path, quantization="bf16").layers[0]
    experts = sum(t.elements for t in layer.tensors if ".experts." in t.name)
    others = sum(t.elements for t in layer.tensors if len(t.shape) > 1) - experts
    # 2 of 4 experts.
    assert layer.work == others + experts // 2


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}


def by_name(weighed: Footprint) -> dict[str, int]:
    return {t.name: t.bytes for module in weighed.modules for t in module.tensors}


@pytest.mark.parametrize("config", [GPTQ, AWQ])
def test_gptq_and_awq_by_their_config(tmp_path: Path, config: dict[str, Any]) -> None:
    weighed = footprint(write_config(tmp_path, quantization_config=config))
    assert (weighed.quantization, weighed.dtype) == (f"{config['quant_method']}-4bit", "float16")
    assert weighed.prequantized
    sizes = by_name(weighed)
    assert sizes["lm_head.weight"] == 100 * 64 * 2
    # [96 out, 64 in]: 3,072 packed, 2 groups of 96 zeros (48 bytes each) and of 96 scales (192 each), and GPTQ's g_idx.
    expected = 64 * 96 // 2 + 2 * 48 + 2 * 192
    assert sizes["model.layers.0.mlp.up_proj.weight"] == expected + (4 * 64 if config is GPTQ else 0)


@pytest.mark.parametrize("config", [GPTQ, AWQ])
def test_biases_of_quantised_linears_stay_in_16_bits(tmp_path: Path, config: dict[str, Any]) -> None:
    path = write_config(tmp_path, quantization_config=config, attention_bias=True)
    sizes = by_name(footprint(path, dtype="float32"))
    assert sizes["model.layers.0.self_attn.q_proj.bias"] == 64 * 2
    assert sizes["model.norm.weight"] == 64 * 4


def test_exempted_modules_keep_their_bytes(tmp_path: Path) -> None:
    kept = footprint(write_config(tmp_path, quantization_config=AWQ | {"modules_to_not_convert": ["up_proj"]}))
    assert by_name(kept)["model.layers.0.mlp.up_proj.weight"] == 64 * 96 * 2
    only = GPTQ | {"modules_in_block_to_quantize": [["mlp.up_proj"]], "dynamic": {r"-:.*layers\.1\.": {}}}
    weighed = footprint(write_config(tmp_path, quantization_config=only))
    quantised = [t.name for module in weighed.modules for t in module.tensors if t.linear]
    assert quantised == ["model.layers.0.mlp.up_proj.weight"]
    assert by_name(weighed)["model.layers.1.mlp.up_proj.weight"] == 64 * 96 * 2


def test_a_quantised_head(tmp_path: Path) -> None:
    config = GPTQ | {"lm_head": True}
    weighed = footprint(write_config(tmp_path, quantization_config=config, vocab_size=128))
    assert by_name(weighed)["lm_head.weight"] == Grouped(method="gptq", bits=4, group_size=32).weight_bytes(
        (128, 64), 2
    )


def test_headers_overrule_the_config_of_a_gptq_checkpoint(tmp_path: Path) -> None:
    write_config(tmp_path, quantization_config=GPTQ)
    name = "model.layers.0.mlp.up_proj"
    stored = {
        f"{name}.qweight": torch.zeros(16, 96, dtype=torch.int32),  # 8 bits: 4 weights an int32
        f"{name}.qzeros": torch.zeros(1, 24, dtype=torch.int32),
        f"{name}.scales": torch.zeros(1, 96, dtype=torch.float16),
        f"{name}.g_idx": torch.zeros(64, dtype=torch.int32),
        "model.layers.1.mlp.up_proj.weight": torch.zeros(96, 64, dtype=torch.bfloat16),
    }
    save_file(stored, tmp_path / "model.safetensors")
    sizes = by_name(footprint(tmp_path))
    assert sizes[f"{name}.weight"] == 16 * 96 * 4 + 24 * 4 + 96 * 2 + 64 * 4
    assert sizes["model.layers.1.mlp.up_proj.weight"] == 96 * 64 * 2


@pytest.mark.parametrize(
    "asked",
    [{"quantization": "nf4"}, {"double_quant": True}, {"skip_modules": ("lm_head",)}, {"quant_block_size": 128}],
)
def test_a_quantised_checkpoint_stays_as_it_is(tmp_path: Path, asked: dict[str, Any]) -> None:
    path = write_config(tmp_path, quantization_config=GPTQ)
    with pytest.raises(PlacementError, match=r"already quantised \(gptq-4bit\).*leave the quantisation out"):
        footprint(path, **asked)


def write_gguf(path: Path, *, tied: bool, vocab: int = 100, layers: int = 2) -> Path:
    """A Llama of `write_config`'s shape as llama.cpp writes it: matrices in Q8_0, norms in float32."""
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(layers)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(16)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocab)

    def matrix(name: str, out: int, inputs: int) -> None:
        data = quantize(np.ones((out, inputs), dtype=np.float32), GGMLQuantizationType.Q8_0)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=GGMLQuantizationType.Q8_0)

    matrix("token_embd", 100, 64)
    writer.add_tensor("rope_freqs.weight", np.ones(8, dtype=np.float32))
    for i in range(2):
        for name, out, inputs in (
            ("attn_q", 64, 64), ("attn_k", 32, 64), ("attn_v", 32, 64), ("attn_output", 64, 64),
            ("ffn_gate", 96, 64), ("ffn_up", 96, 64), ("ffn_down", 64, 96),
        ):  # fmt: skip
            matrix(f"blk.{i}.{name}", out, inputs)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", np.ones(64, dtype=np.float32))
    writer.add_tensor("output_norm.weight", np.ones(64, dtype=np.float32))
    if not tied:
        matrix("output", 100, 64)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("quantization", ["nf4", "int8", "bf16"])
def test_a_gguf_is_served_as_its_model_would_be(tmp_path: Path, tied: bool, quantization: str) -> None:
    from_gguf = footprint(write_gguf(tmp_path / "tiny.gguf", tied=tied), quantization=quantization, name="tiny")
    config = write_config(tmp_path, tie_word_embeddings=tied)
    assert from_gguf == footprint(config, quantization=quantization, name="tiny")


def test_a_gguf_that_its_metadata_contradicts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlacementError, match=r"stores 68,160 weights, but the model of its metadata has 99,008"):
        footprint(write_gguf(tmp_path / "tiny.gguf", tied=True, layers=3))


def test_a_gguf_of_unknown_architecture_is_refused(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "x.gguf", "rocket")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(PlacementError, match="architecture rocket are not planned yet"):
        footprint(tmp_path / "x.gguf")
