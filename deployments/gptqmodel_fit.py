"""Which GPTQ and AWQ checkpoints are loaded here: by GPTQModel on the CPU, on GPUs without it. Nothing is imported to
find out."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from placement.hardware import DeviceType
from placement.recipe import Grouped

EXTRA = "pip install 'headroom[gptq]'"
DEQUANTISE = "make a plain checkpoint of it: python -m deployments.dequantize FOLDER NEW_FOLDER"
_PACKAGES = ("gptqmodel", "optimum")
_FORMATS = {"gptq": ("gptq", "gptq_v2"), "awq": ("gemm",)}
_BITS = (2, 4, 8)


def why_not(recipe: Grouped, config: Mapping[str, Any], device_type: DeviceType) -> str | None:
    """Why a checkpoint is not loaded, with the mend, as the end of a sentence; None: it is.

    Args:
        config: its quantization_config, which `recipe` was read from.
    """
    if reason := why_not_read(recipe, config):
        return reason
    stored = f"is quantised already ({recipe.name})"
    if recipe.overrides or recipe.lm_head:
        part = "its head, too" if recipe.lm_head else "with settings of their own for some modules (dynamic)"
        return f"{stored}, {part}, which transformers does not load; {DEQUANTISE}"
    if device_type == "cuda":
        return None
    if absent := [name for name in _PACKAGES if find_spec(name) is None]:
        return f"{stored}, which needs {' and '.join(absent)}, not installed here; {EXTRA}"
    return None


def why_not_on_gpus(recipe: Grouped) -> str:
    """The same of one whose linears don't suit GPUs (`placement.footprint.Footprint.on_gpus`)."""
    return (
        f"is quantised already ({recipe.name}), and GPUs have codes of up to 4 bits in whole groups; set "
        f"`device: cpu`, or {DEQUANTISE}"
    )


def why_not_read(recipe: Grouped, config: Mapping[str, Any]) -> str | None:
    """The same of what is stored, whatever loads it."""
    formats, named = _FORMATS[recipe.method], stored_format(recipe, config)
    if named not in formats:
        known = " and ".join(formats)
        return f"is quantised already ({recipe.name}) in the format {named}, and of {recipe.method} {known} can be read"
    if unread := {recipe.bits, *(bits for _, bits, _ in recipe.overrides if bits)}.difference(_BITS):
        return (
            f"is quantised already to {', '.join(map(str, sorted(unread)))} bits, and of {recipe.method} "
            f"{', '.join(map(str, _BITS))} bits can be read; give the unquantised model"
        )
    return None


def stored_format(recipe: Grouped, config: Mapping[str, Any]) -> str:
    """gptq, gptq_v2, gemm or another, as transformers reads it: the older of the two names counts."""
    older = "version" if recipe.method == "awq" else "checkpoint_format"
    return str(config.get(older) or config.get("format") or _FORMATS[recipe.method][0]).lower()
