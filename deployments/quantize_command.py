"""`headroom quantize MODEL FOLDER`: a checkpoint quantised by bitsandbytes, as transformers writes and reads it.

What Headroom would make at a start, to be kept, shared, or loaded elsewhere; a pool whose `source` it is loads it as it
is. On a GPU quantising takes seconds where the CPU takes minutes.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from deployments import store
from deployments.checkpoint import WEIGHT_SUFFIXES
from deployments.compare.command import device_of
from deployments.errors import ConfigError
from deployments.home import state_folder
from deployments.once import make_new
from placement.plan_command import OneLineParser


def main(arguments: Sequence[str]) -> int:
    """Quantise, and write; 0 when it is done.

    Raises:
        ConfigError: options that contradict each other, a folder that is there, or a checkpoint that can't be
            quantised; one line.
    """
    options = _parser().parse_args(arguments)
    if options.double_quant and options.quantization == "int8":
        raise ConfigError("--double-quant is for nf4 and fp4; leave it out, or choose one of them")
    target: Path = options.folder.absolute()
    if target.exists():  # told before the model is fetched
        raise ConfigError(f"{target} is there already; name a folder that isn't")
    device = device_of(options.device)
    local = store.fetch(options.model, revision=options.revision, home=state_folder(), progress=_say)
    from deployments.engine.loader import quantised_already

    if quantised_already(local.path):
        raise ConfigError(f"{options.model} is quantised already; give the unquantised model")
    _say(f"quantising {options.model} to {options.quantization} on {'the GPU' if device == 'cuda' else 'the CPU'}")
    make_new(target, lambda folder: _write(local.path, folder, options, 0 if device == "cuda" else "cpu"))
    size = sum(path.stat().st_size for path in target.glob("*.safetensors"))
    _say(f"wrote {target}: {size / 1e9:.2f} GB of weights; serve it with `source: {target}`")
    return 0


def _write(source: Path, folder: Path, options: argparse.Namespace, device: int | str) -> None:
    from deployments.engine.loader import bitsandbytes_config, read_quantised
    from placement.anatomy import fused_experts

    config = bitsandbytes_config(options.quantization, double_quant=options.double_quant, dtype=options.dtype)
    assert config is not None, "argparse knows no other"
    model = read_quantised(source, config, options.dtype, device, head=options.quantize_head)
    if experts := fused_experts(model, 1).values():
        size = sum(weights.nbytes for weights in experts)
        _say(
            f"its experts ({size / 1e9:.2f} GB) are fused and stay in {options.dtype} in such "
            "a checkpoint; a pool of the unquantised model with `quantize_experts: true` quantises them at its start"
        )
    model.save_pretrained(folder)
    kept_out = (*WEIGHT_SUFFIXES, ".index.json")
    for path in source.iterdir():  # the tokenizer, its templates, a licence
        if path.is_file() and not path.name.endswith(kept_out) and not (folder / path.name).exists():
            shutil.copy(path, folder / path.name)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="headroom quantize",
        description="Write a checkpoint quantised by bitsandbytes, for Headroom, transformers or others.",
    )
    parser.add_argument("model", help="demo, a Hugging Face id, a folder, or a .gguf file")
    parser.add_argument("folder", type=Path, help="to be made")
    parser.add_argument("--revision", help="branch, tag or commit of a Hugging Face id")
    parser.add_argument("--quantization", choices=("nf4", "fp4", "int8"), default="nf4", help="default: %(default)s")
    parser.add_argument("--double-quant", action="store_true", help="nf4 and fp4: quantise the scales too")
    parser.add_argument(
        "--quantize-head", action="store_true", help="the head too; from a tied embedding it is a quantised copy"
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        default="bfloat16",
        help="of what is not quantised, and of computation; default: %(default)s",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    return parser


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
