"""Tiny random models, one per architecture, saved where a test says; and what a loaded one really holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

LAYERS = 4
_COMMON = {"hidden_size": 72, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "vocab_size": 200}
_GLU = {**_COMMON, "intermediate_size": 162, "num_key_value_heads": 2, "max_position_embeddings": 512}
_GEMMA = {**_GLU, "head_dim": 32, "sliding_window": 64}

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
}

QUANTIZATIONS = [("nf4", False), ("nf4", True), ("fp4", False), ("int8", False), ("bf16", False), ("fp32", False)]


def save(name: str, folder: Path) -> Path:
    """A random model of one architecture, in float32."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS[name]).save_pretrained(folder)
    return folder


def load(folder: Path, quantization: str, double_quant: bool, dtype: str, device_map: object) -> PreTrainedModel:
    """As the engine loads it."""
    torch_dtype = getattr(torch, dtype)
    config = None
    if quantization in ("nf4", "fp4"):
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization,
            bnb_4bit_use_double_quant=double_quant,
            bnb_4bit_compute_dtype=torch_dtype,
        )
    elif quantization == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch_dtype, device_map=device_map
    )


def held_bytes(model: PreTrainedModel, modules: Iterable[str]) -> int:
    """Bytes of all distinct tensors that `modules` hold together, quantisation state included."""
    distinct = {t.data_ptr(): t.nbytes for name in modules for t in _tensors(model.get_submodule(name))}
    return sum(distinct.values())


def _tensors(module: torch.nn.Module) -> Iterator[Tensor]:
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
