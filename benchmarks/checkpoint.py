"""Checkpoints of real shapes with random weights, written once: `write(shape, folder)`.

    python -m benchmarks.checkpoint 8b                    writes one, and says where it is

Time and memory do not depend on what the weights are, as long as they are not zeros. Its tokenizer reads bytes, and
writes each other id as a word, so `headroom serve` and `headroom compare` take such a folder too (its perplexities then
compare with each other, and say nothing else).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from benchmarks.packed import packed

_LLAMA3: dict[str, Any] = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072}
_TINY: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 1024, "max_position_embeddings": 8192,
}  # fmt: skip
_MISTRAL: dict[str, Any] = {  # Mistral-7B-v0.2
    "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768,
    "sliding_window": None, "rope_theta": 1e6, "tie_word_embeddings": False,
}  # fmt: skip
_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
_AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _TINY,
    "tiny-gptq": {**_TINY, "quantization_config": _GPTQ | {"desc_act": True}},
    "tiny-awq": {**_TINY, "quantization_config": _AWQ},
    "1b": {  # Llama-3.2-1B, its head untied
        **_LLAMA3, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "head_dim": 64,
    },
    "8b": {  # Llama-3.1-8B
        **_LLAMA3, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    },
    "14b": {  # Qwen2.5-14B, without its biases
        "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 48, "num_attention_heads": 40,
        "num_key_value_heads": 8, "vocab_size": 152064, "max_position_embeddings": 32768,
    },
    "32b": {  # Qwen2.5-32B, without its biases
        "hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64, "num_attention_heads": 40,
        "num_key_value_heads": 8, "vocab_size": 152064, "max_position_embeddings": 32768,
    },
    "70b": {  # Llama-3.1-70B
        **_LLAMA3, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    },
    "mistral-7b": _MISTRAL,
    "mistral-7b-gptq": {**_MISTRAL, "quantization_config": _GPTQ},
    "mistral-7b-gptq-act-order": {**_MISTRAL, "quantization_config": _GPTQ | {"desc_act": True}},
    "mistral-7b-awq": {**_MISTRAL, "quantization_config": _AWQ},
    "bloom-3b": {  # which attends in code of its own, with a tied embedding of 1.28 GB
        "model_type": "bloom", "vocab_size": 250880, "hidden_size": 2560, "n_layer": 30, "n_head": 32,
        "seq_length": 2048, "max_position_embeddings": 2048,
    },
    "moe-7b": {  # as Qwen3-30B-A3B, with 12 of its 48 layers: 128 experts of 768, 8 of them for a token
        "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 12,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 6144,
        "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
        "max_position_embeddings": 32768, "tie_word_embeddings": False,
    },
    "moe-tiny": {
        "model_type": "qwen3_moe", "vocab_size": 1024, "hidden_size": 256, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 512,
        "moe_intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True,
        "max_position_embeddings": 8192, "tie_word_embeddings": False,
    },
    "t5-3b": {  # with which T5's sequences are of up to 512 tokens
        "model_type": "t5", "vocab_size": 32128, "d_model": 1024, "d_kv": 128, "d_ff": 16384, "num_layers": 24,
        "num_decoder_layers": 24, "num_heads": 32, "max_position_embeddings": 512, "decoder_start_token_id": 0,
    },
    "t5-tiny": {
        "model_type": "t5", "vocab_size": 1024, "d_model": 128, "d_kv": 32, "d_ff": 512, "num_layers": 3,
        "num_decoder_layers": 3, "num_heads": 4, "max_position_embeddings": 512, "decoder_start_token_id": 0,
    },
}  # fmt: skip
"""Configs by name; of Llama models where they name no other type. With a quantization_config the linears are packed."""
FOLDER = Path("/tmp/headroom-checkpoints")
_CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
_SHARD_BYTES = 4 * 10**9
_SCALE = 0.02
"""Standard deviation of the weights, as models are initialised: activations stay in range."""


def write(shape: str, folder: Path) -> Path:
    """The checkpoint of a shape below `folder`, in bfloat16 (beside packed weights float16); what is there already is
    kept."""
    target = folder / f"random-{shape}"
    if (target / "config.json").exists():
        return target
    partial = folder / f"random-{shape}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    config = shape_config(shape)
    shards = list(_shards(config))
    index = {}
    with ThreadPoolExecutor(4) as pool:
        writes = []
        for i, names in enumerate(shards, 1):
            file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            tensors = {key: value for name, size in names.items() for key, value in _made(name, size, config).items()}
            index.update(dict.fromkeys(tensors, file))
            writes.append(pool.submit(save_file, tensors, partial / file, {"format": "pt"}))
        for done in writes:
            done.result()
    (partial / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config.save_pretrained(partial)
    _tokenizer(config.vocab_size).save_pretrained(partial)
    return partial.rename(target)


def main(arguments: list[str]) -> int:
    """Write the checkpoint of a shape."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint", description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="default: %(default)s")
    options = parser.parse_args(arguments)
    path = write(options.shape, options.folder)
    _tokenizer(shape_config(options.shape).vocab_size).save_pretrained(path)  # those written before have another
    print(path)
    return 0


def asked(shape: str, quantization: str) -> dict[str, Any]:
    """What the planner is asked for: a quantisation; or, where it is what a shape is packed as (`gptq`, `awq`), nothing
    but the dtype that a pool has on GPUs.

    Raises:
        ValueError: the shape is packed otherwise, or not at all.
    """
    stored = SHAPES[shape].get("quantization_config")
    method = stored and stored["quant_method"]
    if (method or quantization) != quantization or (quantization in ("gptq", "awq") and not method):
        raise ValueError(f"the checkpoint of {shape} is {method or 'not quantised'}, and {quantization} was asked for")
    return {"dtype": "bfloat16"} if method else {"quantization": quantization}


def _tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Each byte of a text is a token; the ids after the bytes are words that no text is read as."""
    vocab = {character: i for i, character in enumerate(sorted(ByteLevel.alphabet()))}
    vocab |= {f"Ġw{i}": i for i in range(len(vocab), vocab_size)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=_CHAT_TEMPLATE)


def shape_config(shape: str) -> PreTrainedConfig:
    """transformers' config of a shape."""
    sizes = {"model_type": "llama", **SHAPES[shape]}
    if sizes["model_type"] == "llama":
        sizes |= {"rope_theta": 500000.0, "tie_word_embeddings": False}
    config = AutoConfig.for_model(**sizes)
    kinds = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING if config.is_encoder_decoder else MODEL_FOR_CAUSAL_LM_MAPPING
    config.architectures = [kinds[type(config)].__name__]
    config.dtype = "float16" if "quantization_config" in sizes else "bfloat16"
    return config


def _shards(config: PreTrainedConfig) -> Iterator[dict[str, torch.Size]]:
    with torch.device("meta"):
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model = auto.from_config(deepcopy(config), dtype=torch.bfloat16)
    shard: dict[str, torch.Size] = {}
    held = 0
    for name, parameter in model.named_parameters():
        if shard and held + parameter.nbytes > _SHARD_BYTES:
            yield shard
            shard, held = {}, 0
        shard[name] = parameter.shape
        held += parameter.nbytes
    yield shard


def _made(name: str, size: torch.Size, config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """What the checkpoint has of a parameter."""
    stored = getattr(config, "quantization_config", None)
    if stored and ".layers." in name and len(size) == 2:
        parts = packed(stored, *size, deviation=_SCALE, device=_device())
        return {f"{name.removesuffix('weight')}{part}": tensor for part, tensor in parts.items()}
    return {name: _random(size, torch.float16 if stored else torch.bfloat16)}


def _random(size: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    if len(size) == 1:
        return torch.ones(size, dtype=dtype)
    return (_SCALE * torch.randn(size, dtype=dtype, device=_device())).cpu()


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
