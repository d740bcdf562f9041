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
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

_LLAMA3: dict[str, Any] = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 1024, "max_position_embeddings": 8192,
    },
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
}  # fmt: skip
"""Configs by name; of Llama models where they name no other type."""
FOLDER = Path("/tmp/headroom-checkpoints")
_CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
_SHARD_BYTES = 4 * 10**9
_SCALE = 0.02
"""Standard deviation of the weights, as models are initialised: activations stay in range."""


def write(shape: str, folder: Path) -> Path:
    """The checkpoint of a shape below `folder`, in bfloat16; what is there already is kept."""
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
            index.update(dict.fromkeys(names, file))
            tensors = {name: _random(size) for name, size in names.items()}
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
    config.architectures, config.dtype = [MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__], "bfloat16"
    return config


def _shards(config: PreTrainedConfig) -> Iterator[dict[str, torch.Size]]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    shard: dict[str, torch.Size] = {}
    held = 0
    for name, parameter in model.named_parameters():
        if shard and held + parameter.nbytes > _SHARD_BYTES:
            yield shard
            shard, held = {}, 0
        shard[name] = parameter.shape
        held += parameter.nbytes
    yield shard


def _random(size: torch.Size) -> torch.Tensor:
    if len(size) == 1:
        return torch.ones(size, dtype=torch.bfloat16)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return (_SCALE * torch.randn(size, dtype=torch.bfloat16, device=device)).cpu()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
