"""`python -m deployments.convert FILE.gguf FOLDER`: a GGUF file becomes a safetensors folder.

Run by `store` in a process of its own, so that torch is not in the caller. Matrices are stored in float16: against
float32 that moves the weights of the embedded model by 2e-4 of their norm and 0.1 % of its NF4 codes by one step, where
bfloat16 moves them by 1.3e-3 and 0.5 %. A model with a value that float16 can't hold is stored in bfloat16.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def convert(source: Path, folder: Path) -> None:
    """Write the model and tokenizer in the GGUF file `source` to the existing empty `folder`."""
    write_tokenizer(source, folder)
    print("tokenizer written; reading the tensors", flush=True)
    read = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32, **_dequantized()
    )
    model = _plain(read, _storage_dtype(read.state_dict().values()))
    print(f"tensors read; writing {sum(p.numel() for p in model.parameters()):,} weights", flush=True)
    model.save_pretrained(folder)


def write_tokenizer(source: Path, folder: Path) -> None:
    """The tokenizer alone."""
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    for name, token in _special_tokens(source).items():
        setattr(tokenizer, name, token)
    tokenizer.save_pretrained(folder)


def _special_tokens(source: Path) -> dict[str, str]:
    """As the file has them: transformers 5.17 takes the BOS for the EOS in files with a GPT-2 tokenizer."""
    reader = GGUFReader(source)
    tokens = reader.get_field("tokenizer.ggml.tokens")
    found = {}
    for name, key in _SPECIAL.items():
        field = reader.get_field(f"tokenizer.ggml.{key}_token_id")
        if tokens is not None and field is not None:
            found[name] = str(tokens.contents(field.contents()))
    return found


def _dequantized() -> dict[str, Any]:
    """Asks for plain weights where transformers would otherwise keep GGUF blocks (5.23; 5.17 has no such option)."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _storage_dtype(tensors: Any) -> torch.dtype:
    largest = max((tensor.abs().max().item() for tensor in tensors if tensor.is_floating_point()), default=0.0)
    return torch.float16 if largest <= torch.finfo(torch.float16).max else torch.bfloat16


def _plain(read: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The same weights in a model that knows nothing of GGUF, which `save_pretrained` would refuse to write."""
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = dtype
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    state: dict[str, Tensor] = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in read.state_dict().items()
    }
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    if read.generation_config is not None:
        model.generation_config = read.generation_config
    return model


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
