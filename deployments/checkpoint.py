"""A local model folder, checked before anything loads: config, tokenizer, and safetensors that are whole.

A safetensors file is 8 bytes of little-endian header length, a JSON header, and the tensors' bytes; the header says
where each tensor ends, so a file cut short or damaged at its head is recognised without reading the tensors.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deployments.errors import ConfigError
from placement.kv import RELATIVE_CONTEXT

INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tekken.json")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".ot", ".onnx", ".onnx_data")
"""Of files that hold weights, of whatever library."""
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
_MAX_HEADER_BYTES = 100_000_000


def check_checkpoint(folder: Path) -> None:
    """Check that `folder` holds a model that `from_pretrained` can load from safetensors.

    Raises:
        ConfigError: one line that names the file at fault and the mend.
    """
    read_config(folder)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ConfigError(f"{folder} has no tokenizer; one of {', '.join(TOKENIZER_FILES)} is needed beside the config")
    for shard in shards(folder):
        check_safetensors(shard)


def read_config(folder: Path) -> dict[str, Any]:
    """The model's config.json.

    Raises:
        ConfigError: it is missing, not JSON, or names no model type.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{folder} has no config.json; give the folder of a Hugging Face model") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} can't be read: {_line(error)}") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise ConfigError(f"{path} names no model_type; give the folder of a Hugging Face model")
    return config


def max_context(folder: Path) -> int:
    """Tokens of the longest sequence that the model was made for.

    Raises:
        ConfigError: the config doesn't say.
    """
    config = read_config(folder)
    for part in (config, config.get("text_config") or {}):
        for name in _CONTEXT_KEYS:
            if isinstance(value := part.get(name), int):
                return value
    if config.get("is_encoder_decoder") and "relative_attention_num_buckets" in config:
        return RELATIVE_CONTEXT
    raise ConfigError(f"{folder / 'config.json'} does not say the longest context; set max_position_embeddings in it")


def is_encoder_decoder(folder: Path) -> bool:
    """Whether the model has an encoder that reads the prompt (T5)."""
    return bool(read_config(folder).get("is_encoder_decoder"))


def has_chat_template(folder: Path) -> bool:
    """Whether the tokenizer brings a chat template."""
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return True
    path = folder / "tokenizer_config.json"
    return path.is_file() and bool(json.loads(path.read_text(encoding="utf-8")).get("chat_template"))


def shards(folder: Path) -> list[Path]:
    """The safetensors files of the model, each of which exists.

    Raises:
        ConfigError: none is there, or one that the index names is missing.
    """
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise ConfigError(f"{index} is damaged: {_line(error)}; fetch the model again") from None
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise ConfigError(
                f"{folder} lacks {len(missing)} of {len(names)} weight files, {missing[0]} first; fetch the model again"
            )
        return [folder / name for name in names]
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        others = [path.name for path in sorted(folder.iterdir()) if path.suffix in (".bin", ".pt", ".pth", ".gguf")]
        there = f"only {', '.join(others[:3])}" if others else "no weights at all"
        raise ConfigError(f"{folder} has {there}; *.safetensors is needed (a .gguf file is given by its own path)")
    return found


def check_safetensors(path: Path) -> None:
    """Check the header of a safetensors file, and that the file is as long as the header says.

    Raises:
        ConfigError: it is cut short or damaged.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
                raise ValueError(f"the header would be {length} bytes")
            header = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is not a whole safetensors file: {_line(error)}; fetch the model again") from None
    if size != (need := 8 + length + max(ends, default=0)):
        raise ConfigError(f"{path} has {size:,} bytes, its header needs {need:,}; fetch the model again")


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
