"""`python -m deployments.dequantize FOLDER NEW_FOLDER`: a GPTQ or AWQ checkpoint becomes a plain one in 16 bits.

The plain one can be quantised as any other, to int8 or NF4, on GPUs too; no library of either method is needed.
`deployments.engine.grouped_codes` has the formats.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from deployments.checkpoint import INDEX, WEIGHT_SUFFIXES, check_safetensors, read_config, shards
from deployments.engine.grouped_codes import awq_codes, gptq_codes, gptq_zeros
from deployments.errors import ConfigError
from deployments.gptqmodel_fit import stored_format, why_not_read
from deployments.once import make_new
from placement.recipe import Grouped, read_recipe

WEIGHTS = "model.safetensors"
_PARTS = ("qweight", "qzeros", "scales", "g_idx")
_OTHER_CONFIGS = ("config.json", "quantize_config.json", "quant_config.json", INDEX)


def dequantize(source: Path, folder: Path) -> Path:
    """Write the plain checkpoint of the quantised one in `source` to `folder`, which must not exist yet.

    Raises:
        ConfigError: `source` holds no whole GPTQ or AWQ checkpoint, or one of another format; or `folder` is there, or
            can't be written.
    """
    if folder.exists():  # told before the checkpoint is read
        raise ConfigError(f"{folder} is there already; name a folder that isn't")
    config = read_config(source)
    stored = config.pop("quantization_config", None) or {}
    recipe = read_recipe(stored) if stored else None
    if not isinstance(recipe, Grouped):
        raise ConfigError(f"{source} is not quantised by GPTQ or AWQ; it can be served as it is")
    if reason := why_not_read(recipe, stored):
        raise ConfigError(f"{source} {reason}")
    files = shards(source)
    for file in files:
        check_safetensors(file)

    def make(target: Path) -> None:
        _write_weights(files, target, recipe, less_one=stored_format(recipe, stored) == "gptq")
        (target / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        for path in source.iterdir():
            if path.is_file() and path.suffix not in WEIGHT_SUFFIXES and path.name not in _OTHER_CONFIGS:
                shutil.copyfile(path, target / path.name)

    make_new(folder.absolute(), make)
    return folder


def gptq_weight(parts: Mapping[str, Tensor], bits: int, *, less_one: bool) -> Tensor:
    """[out, in] in the dtype of the scales.

    Args:
        parts: qweight int32 [in*bits/32, out], qzeros int32 [groups, out*bits/32], scales [groups, out] and g_idx
            int [in], by name.
        less_one: zeros are stored less one.
    """
    groups = parts["g_idx"].long()
    codes = gptq_codes(parts["qweight"], bits)
    zeros = gptq_zeros(parts["qzeros"], bits, less_one=less_one)
    return _scaled(codes, zeros, parts["scales"], groups)


def awq_weight(parts: Mapping[str, Tensor]) -> Tensor:
    """[out, in] in the dtype of the scales; qweight int32 [in, out/8], qzeros int32 [groups, out/8], scales
    [groups, out], by name."""
    codes, zeros = (awq_codes(parts[name]) for name in ("qweight", "qzeros"))
    groups = torch.arange(len(codes)) // (len(codes) // len(zeros))
    return _scaled(codes, zeros, parts["scales"], groups)


def _scaled(codes: Tensor, zeros: Tensor, scales: Tensor, groups: Tensor) -> Tensor:
    return ((codes - zeros[groups]).to(scales.dtype) * scales[groups]).t().contiguous()


def _write_weights(files: list[Path], target: Path, recipe: Grouped, *, less_one: bool) -> None:
    """One new file for each old one that has weights; a linear's parts may lie in several of the old ones. A lone file
    gets the name by which transformers looks for one, which GPTQ's own tools do not give it."""
    places = {name: file for file in files for name in _names(file)}
    if lone := [name for name in places if name.endswith(".scales") and f"{name[:-6]}qweight" not in places]:
        raise ConfigError(f"{lone[0]} scales no linear but an activation, which plain models don't; serve it as it is")
    index: dict[str, str] = {}
    total = 0
    for file in files:
        tensors = dict(_plain(file, places, recipe, less_one))
        if not tensors:
            continue
        print(f"{file.name}: {len(tensors)} tensors", flush=True)
        save_file(tensors, target / (file.name if len(files) > 1 else WEIGHTS), metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file.name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(files) > 1:
        body = {"metadata": {"total_size": total}, "weight_map": index}
        (target / INDEX).write_text(json.dumps(body, indent=2), encoding="utf-8")


def _plain(file: Path, places: Mapping[str, Path], recipe: Grouped, less_one: bool) -> Iterator[tuple[str, Tensor]]:
    for name in _names(file):
        linear, _, end = name.rpartition(".")
        if f"{linear}.qweight" not in places or end not in _PARTS:
            yield name, _tensor(file, name)
        elif end == "qweight":
            parts = {part: _tensor(places[key], key) for part in _PARTS if (key := f"{linear}.{part}") in places}
            own: Any = recipe.for_module(linear) or recipe
            yield f"{linear}.weight", _weight(linear, parts, own, less_one)


def _weight(linear: str, parts: Mapping[str, Tensor], recipe: Grouped, less_one: bool) -> Tensor:
    needed = _PARTS if recipe.method == "gptq" else _PARTS[:-1]
    if absent := [part for part in needed if part not in parts]:
        raise ConfigError(f"{linear} has no {' and no '.join(absent)} beside its qweight; fetch the model again")
    return awq_weight(parts) if recipe.method == "awq" else gptq_weight(parts, recipe.bits, less_one=less_one)


def _names(file: Path) -> list[str]:
    with safe_open(file, "pt") as opened:
        return list(opened.keys())


def _tensor(file: Path, name: str) -> Tensor:
    with safe_open(file, "pt") as opened:
        tensor: Tensor = opened.get_tensor(name)
        return tensor


def main(argv: list[str]) -> int:
    """The command; 2 for what the user has to mend."""
    if len(argv) != 3:
        print(__doc__.partition(":")[0] if __doc__ else "", file=sys.stderr)
        return 2
    try:
        folder = dequantize(Path(argv[1]), Path(argv[2]))
    except ConfigError as error:
        print(f"dequantize: {error}", file=sys.stderr)
        return 2
    print(f"{folder} can be served: `source: {folder}`, `quantization: int8` or nf4")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
