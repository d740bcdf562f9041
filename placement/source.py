"""Where a model's facts come from: a folder, a config.json, a .gguf file, or a Hugging Face id (cache, then hub)."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from placement.errors import PlacementError
from placement.headers import Gguf, Headers, read_gguf, read_safetensors

_CONFIG = "config.json"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Source:
    """What is known of a model before anything loads."""

    name: str
    config: Mapping[str, Any]
    """config.json; empty for a GGUF file, whose metadata stands in its place."""
    headers: Headers
    """Of its stored tensors, under the file's own names; empty when none can be read."""
    gguf: Gguf | None = None

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """`quantization_config`, where the checkpoint is quantised already."""
        text = self.config.get("text_config")
        nested = text.get("quantization_config") if isinstance(text, dict) else None
        found = self.config.get("quantization_config") or nested
        if found is not None and not isinstance(found, dict):
            raise PlacementError(f"quantization_config of {self.name} must be a JSON object")
        return found


def find_source(model: str | Path) -> Source:
    """What there is to read of `model`.

    Args:
        model: a folder with a config.json (its safetensors headers are read where all its files are there), a .gguf
            file, a config.json (any .json file) alone, or a Hugging Face id. The local cache is asked first, and the
            hub for what is not whole there, config.json and headers alone.

    Raises:
        PlacementError: no such model, or one that can't be read.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return Source(path.absolute().name, _read_config(path / _CONFIG), read_safetensors(path))
    if path.suffix.lower() == ".gguf" and path.is_file():
        header = read_gguf(path)
        return Source(path.stem, {}, header.tensors, header)
    if path.suffix.lower() == ".json" and path.is_file():
        return Source(path.absolute().parent.name, _read_config(path), {})
    if path.suffix.lower() in (".gguf", ".json") or not _is_id(str(model)):
        raise PlacementError(
            f"{path} does not exist; give a folder with a Hugging Face model, its config.json, a .gguf file, or an id "
            "such as org/model"
        )
    return _by_id(str(model))


def _by_id(model: str) -> Source:
    # Imported here: most models are given by a path, and are read without it.
    from huggingface_hub import constants

    cached = _cached_config(model)
    headers = read_safetensors(cached.parent) if cached else {}
    if cached and (headers or constants.HF_HUB_OFFLINE):
        return Source(model, _read_config(cached), headers)
    if constants.HF_HUB_OFFLINE:
        raise PlacementError(
            f"there is no folder {model}, no config.json of a model of that name in the cache "
            f"{constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set; unset it, or fetch it once: hf download {model} "
            f"{_CONFIG}"
        )
    from placement import hub

    try:
        text, headers = hub.read_model(model)
    except hub.HubError as error:
        if cached is None:
            raise PlacementError(f"there is no folder {model}, and {error}") from None
        _log.warning("planned from the cached config.json of %s alone: %s", model, error)
        return Source(model, _read_config(cached), {})
    return Source(model, _parse_config(text, f"{_CONFIG} of {model}"), headers)


def _is_id(text: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", text) is not None


def _cached_config(model: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, _CONFIG)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def _read_config(path: Path) -> dict[str, Any]:
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise PlacementError(f"{path} does not exist; give a folder with a Hugging Face model") from None
    except OSError as error:
        raise PlacementError(f"{path} can't be read: {error}") from None
    return _parse_config(text, str(path))


def _parse_config(text: bytes, where: str) -> dict[str, Any]:
    try:
        config = json.loads(text.decode(), object_hook=_special_float)
    except ValueError as error:
        raise PlacementError(f"{where} can't be read: {error}") from None
    if not isinstance(config, dict):
        raise PlacementError(f"{where} must hold a JSON object")
    return config


def _special_float(entry: dict[str, Any]) -> Any:
    """Infinity and NaN, which JSON lacks, as transformers writes them: {"__float__": "Infinity"}."""
    return float(entry["__float__"]) if entry.keys() == {"__float__"} else entry
