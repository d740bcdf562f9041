"""Elements per token and per sequence for each kind of cache, by hand and against transformers' own caches."""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig

from placement.errors import PlacementError
from placement.footprint import footprint
from placement.kv import (
    LayerKv,
    dtype_bytes,
    kv_dtype_bytes,
    kv_dtype_name,
    layer_kv,
    sequence_bytes,
    why_not_served,
)

BASE = {"num_hidden_layers": 2, "num_attention_heads": 8, "hidden_size": 256}
_TINY = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 2}
_DELTA = {
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 8,
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}

CACHES: dict[str, PreTrainedConfig] = {
    "llama": transformers.LlamaConfig(**_TINY),
    "qwen3_next": transformers.Qwen3NextConfig(**_TINY, **_DELTA, **_MOE),
    "qwen3_5": transformers.Qwen3_5TextConfig(**_TINY, **_DELTA),
    "jamba": transformers.JambaConfig(
        **_TINY, attn_layer_period=2, attn_layer_offset=1, num_experts=2, mamba_d_state=8
    ),
    "bamba": transformers.BambaConfig(**_TINY, **_MAMBA2, attn_layer_indices=[1]),
    "falcon_h1": transformers.FalconH1Config(**_TINY, **(_MAMBA2 | {"mamba_n_heads": 6}), mamba_d_ssm=96),
    "granite_hybrid": transformers.GraniteMoeHybridConfig(
        **_TINY,
        **_MAMBA2,
        layer_types=["mamba", "attention"] * 2,
        num_local_experts=2,
        num_experts_per_tok=1,
        shared_intermediate_size=32,
    ),
    "lfm2": transformers.Lfm2Config(**_TINY, full_attn_idxs=[1, 3], conv_L_cache=3),
    "deepseek_v3": transformers.DeepseekV3Config(
        **(_TINY | {"num_key_value_heads": 4}),
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=24,
        q_lora_rank=None,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
    ),
    # Key and value sizes that differ from layer to layer, and layers that read another's.
    "gemma4": transformers.Gemma4TextConfig(
        **_TINY,
        head_dim=16,
        global_head_dim=32,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=16,
        vocab_size_per_layer_input=100,
    ),
}


@pytest.mark.parametrize(
    ("config", "elements"),
    [
        (BASE, 2 * 8 * 32),  # MHA
        ({**BASE, "num_key_value_heads": 2}, 2 * 2 * 32),  # GQA
        ({**BASE, "num_key_value_heads": 1}, 2 * 1 * 32),  # MQA
        ({**BASE, "num_key_value_heads": 8, "multi_query": True}, 2 * 1 * 32),
        # Falcon 40B: its config says multi_query too.
        ({**BASE, "new_decoder_architecture": True, "multi_query": True, "num_kv_heads": 4}, 2 * 4 * 32),
        ({**BASE, "num_key_value_heads": 2, "head_dim": 128}, 2 * 2 * 128),
        ({**BASE, "kv_lora_rank": 512, "qk_rope_head_dim": 64}, 512 + 64),  # MLA
    ],
)
def test_elements_per_token(config: dict[str, object], elements: int) -> None:
    assert [kv.elements_per_token for kv in layer_kv(config)] == [elements] * 2


def test_a_window_lowers_no_byte_of_the_plan() -> None:
    config = {**BASE, "sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}
    layers = layer_kv(config)
    assert layers == (LayerKv(8, 32, 64), LayerKv(8, 32, None))
    assert layers[0].elements_per_token == layers[1].elements_per_token == 512
    assert [kv.window for kv in layer_kv({**BASE, "sliding_window": 64})] == [64, 64]


def test_what_a_window_aware_cache_would_hold() -> None:
    layers = (LayerKv(8, 32, 64), LayerKv(8, 32, None))
    # A token is 512 elements of 2 bytes in each layer; of 1,000 tokens a window of 64 needs 64.
    assert sequence_bytes(layers, 1000, kv_dtype="float16", dtype="float16") == 2 * 1000 * 1024
    assert sequence_bytes(layers, 1000, kv_dtype="float16", dtype="float16", window_aware=True) == 1064 * 1024
    assert sequence_bytes(layers, 10, kv_dtype="fp8", dtype="float16", window_aware=True) == 20 * 512


def test_an_encoder_decoder_caches_in_its_decoder_alone() -> None:
    config = {**BASE, "head_dim": 16, "is_encoder_decoder": True, "encoder_layers": 2, "decoder_layers": 3}
    layers = layer_kv(config)
    assert [kv.elements_per_token for kv in layers] == [0, 0, 256, 256, 256]
    assert layers[2] == LayerKv(8, 16, cross_elements=256)


@pytest.mark.parametrize("name", CACHES)
def test_bytes_equal_those_of_transformers_cache(name: str, tmp_path: Path) -> None:
    tokens, config = 9, CACHES[name]
    config.save_pretrained(tmp_path)
    layers = footprint(tmp_path, quantization="bf16").geometry.kv
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train(False)
    with torch.no_grad():
        cache = model(input_ids=torch.arange(1, tokens + 1)[None], use_cache=True).past_key_values
    # transformers before 5.23 has no entry for layers at the end that share the cache of others.
    for expected, layer in zip_longest(layers, cache.layers):
        held = [
            tensor for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)) if tensor is not None
        ]
        states = [*getattr(layer, "conv_states", {}).values(), *getattr(layer, "recurrent_states", {}).values()]
        held += [tensor for tensor in states if tensor is not None]
        assert sequence_bytes([expected], tokens, kv_dtype="bfloat16", dtype="bfloat16") == sum(t.nbytes for t in held)


def test_caches_without_a_formula_are_refused_by_name() -> None:
    with pytest.raises(PlacementError, match="layers of type compressed_sparse_attention keep a cache"):
        layer_kv({**BASE, "layer_types": ["compressed_sparse_attention", "full_attention"]})
    with pytest.raises(PlacementError, match="linear_attention keep a state whose sizes toy does not name"):
        layer_kv({**BASE, "layer_types": ["linear_attention", "full_attention"], "model_type": "toy"})


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        ((LayerKv(8, 64), LayerKv(8, 64, 100)), None),
        ((LayerKv(8, 64), LayerKv(1, 576, latent=True)), None),
        ((LayerKv(8, 64), LayerKv(conv_elements=9)), "recurrent state"),
        ((LayerKv(8, 64), LayerKv(8, 64, recurrent_elements=9)), "recurrent state"),
        ((LayerKv(8, 64), LayerKv()), "layers without attention"),
        ((LayerKv(), LayerKv(8, 64, cross_elements=8)), None),
    ],
)
def test_what_the_engine_can_not_hold_yet(layers: tuple[LayerKv, ...], reason: str | None) -> None:
    found = why_not_served(layers)
    assert found is None if reason is None else reason in str(found)


def test_dtype_bytes() -> None:
    assert [dtype_bytes(name) for name in ("bfloat16", "float16", "float32")] == [2, 2, 4]
    assert [kv_dtype_bytes(name) for name in ("bfloat16", "float32", "float8_e4m3fn", "fp8")] == [2, 4, 1, 1]
    assert kv_dtype_name("fp8") == "float8_e4m3fn"
    with pytest.raises(PlacementError, match="use one of bfloat16"):
        dtype_bytes("float8_e4m3fn")
    with pytest.raises(PlacementError, match=r"use one of bfloat16.*, fp8"):
        kv_dtype_name("int8")
