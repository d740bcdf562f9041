"""Which GPTQ and AWQ checkpoints GPTQModel loads here. Nothing is imported to find out."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from placement.hardware import DeviceType
from placement.recipe import Grouped

EXTRA = "pip install 'headroom[gptq]'"
_PACKAGES = ("gptqmodel", "optimum")
_FORMATS = {"gptq": ("gptq", "gptq_v2"), "awq": ("gemm",)}
_BITS = (2, 4, 8)


def why_not(recipe: Grouped, config: Mapping[str, Any], device_type: DeviceType) -> str | None:
    """Why a checkpoint is not loaded, with the mend, as the end of a sentence; None: it is.

    Args:
        config: its quantization_config, which `recipe` was read from.
    """
    stored = f"is quantised already ({recipe.name})"
    formats, named = _FORMATS[recipe.method], _format(recipe, config)
    if named not in formats:
        return f"{stored} in the format {named}, and of {recipe.method} {' and '.join(formats)} can be loaded"
    if recipe.bits not in _BITS:
        return f"{stored}, and {', '.join(map(str, _BITS))} bits can be loaded; give a checkpoint of as many"
    if recipe.overrides or recipe.lm_head:
        part = "its head, too" if recipe.lm_head else "with settings of their own for some modules (dynamic)"
        return f"{stored}, {part}, which transformers does not load; quantise all linears of the layers, and only them"
    if device_type == "cuda":
        return f"{stored}, which is for the CPU yet; set `device: cpu`, or give the unquantised model"
    if absent := [name for name in _PACKAGES if find_spec(name) is None]:
        return f"{stored}, which needs {' and '.join(absent)}, not installed here; {EXTRA}"
    return None


def _format(recipe: Grouped, config: Mapping[str, Any]) -> str:
    """As transformers reads it: the older of the two names counts."""
    older = "version" if recipe.method == "awq" else "checkpoint_format"
    return str(config.get(older) or config.get("format") or _FORMATS[recipe.method][0]).lower()
