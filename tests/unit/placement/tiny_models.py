"""Tiny random models, one per architecture, saved where a test says; and what a loaded one really holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

LAYERS = 4
_COMMON: dict[str, Any] = {
    "hidden_size": 72,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "vocab_size": 200,
}
_GLU = {**_COMMON, "intermediate_size": 162, "num_key_value_heads": 2, "max_position_embeddings": 512}
_GEMMA = {**_GLU, "head_dim": 32, "sliding_window": 64}
_MOE = {**_GLU, "moe_intermediate_size": 54, "num_experts_per_tok": 2, "pad_token_id": None}

# Odd widths on purpose: a weight whose elements are no multiple of the block of 64, or of the nested 64 * 256.
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": transformers.LlamaConfig(**_GLU, attention_bias=True),
    "llama_tied": transformers.LlamaConfig(**{**_GLU, "intermediate_size": 300}, tie_word_embeddings=True),
    "mistral": transformers.MistralConfig(**_GLU, sliding_window=64),
    "qwen2": transformers.Qwen2Config(**_GLU, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**_GLU, head_dim=32),
    "gemma2": transformers.Gemma2Config(**_GEMMA),
    "gemma3": transformers.Gemma3TextConfig(**_GEMMA),
    "opt": transformers.OPTConfig(**_COMMON, ffn_dim=162, word_embed_proj_dim=32, max_position_embeddings=512),
    "gpt_neox": transformers.GPTNeoXConfig(**_COMMON, intermediate_size=162, max_position_embeddings=512),
    "phi3": transformers.Phi3Config(**_GLU, pad_token_id=0),
    "falcon": transformers.FalconConfig(**_COMMON, multi_query=True, new_decoder_architecture=False),
    "gpt2": transformers.GPT2Config(n_embd=72, n_layer=LAYERS, n_head=4, vocab_size=200, n_positions=512),
    "mixtral": transformers.MixtralConfig(**_GLU, num_local_experts=4),
    "qwen3_moe": transformers.Qwen3MoeConfig(**_MOE, head_dim=16, num_experts=4),
    "bloom": transformers.BloomConfig(hidden_size=72, n_layer=LAYERS, n_head=4, vocab_size=200, seq_length=512),
    "gptj": transformers.GPTJConfig(
        n_embd=72, n_layer=LAYERS, n_head=4, n_inner=162, rotary_dim=8, vocab_size=200, n_positions=512
    ),
    "mpt": transformers.MptConfig(d_model=72, n_layers=LAYERS, n_heads=4, vocab_size=200, max_seq_len=512),
    "gpt_neo": transformers.GPTNeoConfig(
        hidden_size=72, num_layers=LAYERS, num_heads=4, vocab_size=200, attention_types=[[["global", "local"], 2]]
    ),
    "stablelm": transformers.StableLmConfig(**_GLU, use_qkv_bias=True),
    "granite": transformers.GraniteConfig(**_GLU, tie_word_embeddings=True),
    "deepseek_v2": transformers.DeepseekV2Config(
        **{**_MOE, "num_key_value_heads": 4},
        n_routed_experts=4,
        n_shared_experts=1,
        first_k_dense_replace=1,
        kv_lora_rank=24,
        q_lora_rank=None,
        qk_rope_head_dim=8,
        qk_nope_head_dim=10,
        v_head_dim=18,
    ),
    "qwen3_next": transformers.Qwen3NextConfig(
        **_MOE, head_dim=16, num_experts=4, shared_expert_intermediate_size=54, linear_num_value_heads=4,
        linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16,
    ),
}  # fmt: skip

_T5: dict[str, Any] = {
    "d_model": 72, "d_kv": 18, "d_ff": 162, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4,
    "vocab_size": 200, "n_positions": 512, "decoder_start_token_id": 0,
}  # fmt: skip
ENCODER_DECODERS: dict[str, PreTrainedConfig] = {
    "t5": transformers.T5Config(**_T5),
    "t5_v1_1": transformers.T5Config(**_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    # Experts that are modules of their own.
    "switch": transformers.SwitchTransformersConfig(
        **{k: v for k, v in _T5.items() if k != "num_decoder_layers"}, num_decoder_layers=3, num_experts=2,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1,
    ),
    "bart": transformers.BartConfig(
        d_model=72, encoder_layers=2, decoder_layers=3, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=162, decoder_ffn_dim=162, vocab_size=200, max_position_embeddings=512,
    ),
}  # fmt: skip

_EYES: dict[str, Any] = {
    "hidden_size": 36, "intermediate_size": 54, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
MULTIMODAL: dict[str, PreTrainedConfig] = {
    # As many layers in the tower as in the text model, so that the two can be mixed up.
    "gemma3_vision": transformers.Gemma3Config(
        text_config=CONFIGS["gemma3"].to_dict(),
        vision_config={"model_type": "siglip_vision_model", **_EYES},
        mm_tokens_per_image=4,
    ),
    "llava": transformers.LlavaConfig(
        text_config=CONFIGS["llama"].to_dict(), vision_config={"model_type": "clip_vision_model", **_EYES}
    ),
    "qwen2_vl": transformers.Qwen2VLConfig(
        text_config=_GLU | {"rope_parameters": {"rope_type": "default", "mrope_section": [3, 3, 3], "rope_theta": 1e4}},
        vision_config={"depth": LAYERS, "embed_dim": 36, "hidden_size": 72, "num_heads": 2, "mlp_ratio": 2},
    ),
}  # fmt: skip

ALL = CONFIGS | ENCODER_DECODERS | MULTIMODAL


def model_class(config: PreTrainedConfig) -> Any:
    """transformers' class that generates text with `config`."""
    if config.is_encoder_decoder:
        return AutoModelForSeq2SeqLM
    return AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageTextToText


def save(name: str, folder: Path) -> Path:
    """A random model of one architecture, in float32."""
    torch.manual_seed(0)
    model_class(ALL[name]).from_config(ALL[name]).save_pretrained(folder)
    return folder


def load(
    folder: Path,
    quantization: str | None,
    double_quant: bool,
    dtype: str,
    device_map: object,
    skip_modules: list[str] | None = None,
) -> PreTrainedModel:
    """As the engine loads it; quantization None: as it is stored."""
    torch_dtype = getattr(torch, dtype)
    config = None
    if quantization in ("nf4", "fp4"):
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization,
            bnb_4bit_use_double_quant=double_quant,
            bnb_4bit_compute_dtype=torch_dtype,
            llm_int8_skip_modules=skip_modules,
        )
    elif quantization == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip_modules)
    options = {} if quantization is None else {"quantization_config": config}
    model: PreTrainedModel = model_class(AutoConfig.from_pretrained(folder)).from_pretrained(
        folder, dtype=torch_dtype, device_map=device_map, **options
    )
    return model


def held_bytes(model: PreTrainedModel, modules: Iterable[str]) -> int:
    """Bytes of all distinct tensors that `modules` (or tensors by name) hold together, quantisation state included."""
    distinct = {t.data_ptr(): t.nbytes for name in modules for t in _tensors(model, name) if t.nbytes}
    return sum(distinct.values())


def _tensors(model: PreTrainedModel, name: str) -> Iterator[Tensor]:
    if name and name not in dict(model.named_modules()):
        yield model.get_parameter_or_buffer(name)
        return
    module = model.get_submodule(name)
    yield from module.buffers()
    for parameter in module.parameters():
        yield parameter
        for attribute in ("CB", "SCB"):
            if isinstance(tensor := getattr(parameter, attribute, None), Tensor):
                yield tensor
        state = getattr(parameter, "quant_state", None)
        while state is not None:
            yield from (value for value in vars(state).values() if isinstance(value, Tensor))
            state = state.state2
