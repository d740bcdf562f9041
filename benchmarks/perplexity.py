"""What quantisation, kernels and a quantised head do to perplexity: `python -m benchmarks.perplexity`.

Every contender of a quantisation has the same quantised weights:

- dequantised: plain linears with the weights that the quantised ones stand for, in the compute dtype;
- bitsandbytes: its linears and kernels; in int8 that is LLM.int8(), which rounds activations and keeps outliers apart;
- headroom: this project's, on a GPU its kernels with fused siblings, on the CPU the definition that they are tested
  against (`deployments/engine/kernels/weights.py`), in float32;
- headroom, head too: the same with `quantize_head`.

All run on transformers' own forward, over the same windows. What must hold: in 4 bits headroom within 0.1 % of
bitsandbytes; in int8 within 0.1 % of the dequantised model, and not above LLM.int8(). The exit code is 1 where it
doesn't. Two ways of rounding to bfloat16 differ by a few parts in ten thousand on a text this short.

A window of many rows is computed by other kernels than the few of a decode step. `--rows 8,32` feeds windows in steps
of so many tokens, over a KV cache; 0 stands for whole windows. On a GPU the kernels that computed the products of one
step are printed below each contender.
"""

from __future__ import annotations

import argparse
import copy
import gc
import hashlib
import logging
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, DynamicCache
from transformers.utils.logging import disable_progress_bar

from benchmarks.kernel_classes import kernel_class
from deployments import store
from deployments.compare.command import TEXT
from deployments.engine.head import quantise_head
from deployments.engine.kernels.fuse import fuse_linears
from deployments.engine.kernels.modules import QuantLinear4, QuantLinear8, replace_linears
from deployments.engine.kernels.weights import dequantise4, dequantise8
from deployments.engine.perplexity import Score, windows
from deployments.home import state_folder

BOUND = 1e-3
"""Of the ratios that must be 1."""
OUTLIERS = 6.0
"""The threshold of LLM.int8(), as its authors chose it."""
Finish = Callable[[Any, BitsAndBytesConfig], None]


def configs(dtype: torch.dtype) -> dict[str, BitsAndBytesConfig]:
    """How transformers quantises, by quantisation."""
    four = {"load_in_4bit": True, "bnb_4bit_compute_dtype": dtype}
    return {
        "nf4": BitsAndBytesConfig(**four, bnb_4bit_quant_type="nf4"),
        "fp4": BitsAndBytesConfig(**four, bnb_4bit_quant_type="fp4"),
        "int8": BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=OUTLIERS),
    }


def as_loaded(model: Any, _config: BitsAndBytesConfig) -> None:
    """bitsandbytes' linears stay; in float32 without the path that rounds to bfloat16 inside, as in the engine."""
    for _, linear in quantised_linears(model):
        if model.dtype == torch.float32 and hasattr(linear, "support_avx512bf16_for_cpu"):
            linear.support_avx512bf16_for_cpu = False


def on_kernels(model: Any, _config: BitsAndBytesConfig) -> None:
    """Headroom's linears in place of bitsandbytes'."""
    if model.device.type == "cuda":
        replace_linears(model)
        fuse_linears(model)
        return
    for name, module in quantised_linears(model):
        model.set_submodule(name, ours(module))


def dequantised(model: Any, _config: BitsAndBytesConfig) -> None:
    """Plain linears of the weights that the quantised ones stand for."""
    for name, module in quantised_linears(model):
        weight = ours(module).quantised
        dense = dequantise8 if isinstance(module, bitsandbytes.nn.Linear8bitLt) else dequantise4
        with torch.device("meta"):
            plain = nn.Linear(weight.k, weight.n, bias=module.bias is not None)
        plain.weight = nn.Parameter(dense(weight, model.dtype), requires_grad=False)
        plain.bias = module.bias
        model.set_submodule(name, plain)


def with_head(model: Any, config: BitsAndBytesConfig) -> None:
    """Headroom's linears, the head among them."""
    quantise_head(model, config)
    on_kernels(model, config)


def quantised_linears(model: nn.Module) -> list[tuple[str, Any]]:
    """bitsandbytes', by name."""
    kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    return [(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]


def ours(linear: Any) -> QuantLinear4 | QuantLinear8:
    """The same weight in this project's linear."""
    return (QuantLinear8 if isinstance(linear, bitsandbytes.nn.Linear8bitLt) else QuantLinear4).of(linear)


CONTENDERS: dict[str, Finish] = {
    "dequantised": dequantised,
    "bitsandbytes": as_loaded,
    "headroom": on_kernels,
    "headroom, head too": with_head,
}


def load(folder: Path, device: str, dtype: torch.dtype, config: BitsAndBytesConfig | None) -> Any:
    """transformers' model, on one device."""
    options = {} if config is None else {"quantization_config": config}
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, device_map={"": device}, local_files_only=True, **options
    )
    return model.eval()


@torch.inference_mode()
def score(model: Any, ids: Sequence[int], window: int, stride: int, rows: int = 0) -> Score:
    """Of a text, by transformers' forward over whole windows, or `rows` tokens at a time."""
    nats, tokens = 0.0, 0
    for each in windows(len(ids), window, stride):
        inside = torch.tensor(ids[each.begin : each.end], device=model.device)
        first = each.first - each.begin
        logits = logits_of(model, inside[None, :-1], rows)[0, first - 1 :]
        losses = torch.nn.functional.cross_entropy(logits.float(), inside[first:], reduction="none")
        nats, tokens = nats + float(losses.double().sum()), tokens + len(losses)
    return Score(nats, tokens)


def logits_of(model: Any, ids: Tensor, rows: int) -> Tensor:
    """[1, tokens, vocab] of int64 ids [1, tokens], in steps of `rows` tokens; 0: in one."""
    if not rows:
        return model(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]  # transformers' output
    cache = DynamicCache(config=model.config)
    steps = [model(input_ids=step, past_key_values=cache, use_cache=True).logits for step in ids.split(rows, dim=1)]
    return torch.cat(steps, dim=1)


@torch.inference_mode()
def kernels_of(model: Any, rows: int) -> str:
    """Which kernels compute the products of a step of so many rows on a GPU."""
    ids = torch.arange(rows, device=model.device)[None]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        model(input_ids=ids, use_cache=False)
        torch.cuda.synchronize()
    return products({event.key: event.count for event in profiler.key_averages()})


def products(ran: dict[str, int]) -> str:
    """Of kernels, by name and how often they ran, those of products and of what is dequantised for them."""
    found: Counter[str] = Counter()
    for name, times in ran.items():
        if kernel_class(name) in ("GEMM", "dequantise"):
            found[re.sub(r"^void |<.*|\(.*", "", name)[:48]] += times
    return ", ".join(f"{times} {name}" for name, times in found.most_common())


def failures(quantization: str, found: dict[str, float]) -> list[str]:
    """What does not hold, in words."""
    reference = "dequantised" if quantization == "int8" else "bitsandbytes"
    ratio = found["headroom"] / found[reference]
    wrong = []
    if not abs(ratio - 1) <= BOUND:
        wrong.append(f"{quantization}: headroom is {ratio - 1:+.3%} off {reference}, over {BOUND:.1%}")
    if quantization == "int8" and not found["headroom"] <= found["bitsandbytes"]:
        wrong.append(f"int8: headroom, {found['headroom']:.4f}, is above LLM.int8(), {found['bitsandbytes']:.4f}")
    return wrong


def main(arguments: Sequence[str]) -> int:
    """Print a line per contender; 1 where something does not hold."""
    options = _parser().parse_args(arguments)
    disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # LLM.int8() logs each product
    folder = store.fetch(options.model, home=state_folder(), progress=lambda line: print(line, file=sys.stderr)).path
    ids = text_ids(folder, options.text)[: options.tokens]
    for file in options.text:
        print(f"{file.name}: sha256 {hashlib.sha256(file.read_bytes()).hexdigest()}")
    wrong = [line for rows in options.rows.split(",") for line in compare(folder, ids, int(rows), options)]
    print("\n".join(wrong) or "all within bounds")
    return 1 if wrong else 0


def text_ids(folder: Path, files: Iterable[Path]) -> list[int]:
    """The tokens of the files' text, one after the other."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    text = "\n\n".join(file.read_text(encoding="utf-8") for file in files)
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    return ids


def compare(folder: Path, ids: Sequence[int], rows: int, options: argparse.Namespace) -> list[str]:
    """Score all contenders in steps of so many rows, a line for each; what does not hold."""
    dtype: torch.dtype = getattr(torch, options.dtype or ("float32" if options.device == "cpu" else "bfloat16"))
    how = options.window, options.stride, rows
    plain = score(load(folder, options.device, dtype, None), ids, *how)
    print(f"{options.model}, {options.device}, {dtype}, {' '.join(file.name for file in options.text)}, "
          f"{f'{rows} rows a step' if rows else 'whole windows'}: {plain.tokens:,} tokens scored")  # fmt: skip
    print(f"{'':6}{'unquantised':20}{plain.perplexity:10.4f}", flush=True)
    wrong: list[str] = []
    for quantization in options.quantization.split(","):
        found: dict[str, float] = {}
        config = configs(dtype)[quantization]
        loaded = load(folder, options.device, dtype, config)
        for name, finish in CONTENDERS.items():
            model = copy.deepcopy(loaded)  # quantising takes longer on a CPU
            finish(model, config)
            found[name] = score(model, ids, *how).perplexity
            against = "  ".join(f"{found[name] / found[other]:.5f} of {other}" for other in list(found)[:-1])
            print(f"{quantization:6}{name:20}{found[name]:10.4f}  {found[name] / plain.perplexity:.5f} of unquantised"
                  f"{'  ' if against else ''}{against}", flush=True)  # fmt: skip
            if model.device.type == "cuda":
                print(f"{'':26}{kernels_of(model, rows or min(options.window, len(ids)) - 1)}", flush=True)
            del model
            gc.collect()
        wrong += [f"{line}, {rows} rows a step" if rows else line for line in failures(quantization, found)]
    return wrong


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.perplexity", description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="demo", help="demo, a Hugging Face id, or a folder")
    parser.add_argument("--quantization", default="nf4,fp4,int8", metavar="NAMES", help="default: %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="default: bfloat16 on GPUs, float32 on the CPU"
    )
    parser.add_argument(
        "--text", type=Path, nargs="+", default=[TEXT], metavar="FILE", help="default: 10 kB of Darwin, 1859"
    )
    parser.add_argument("--tokens", type=int, metavar="N", help="of the text; default: all")
    parser.add_argument("--rows", default="0", metavar="NUMBERS", help="tokens of a step; 0: whole windows (default)")
    parser.add_argument("--window", type=int, default=1024, metavar="TOKENS")
    parser.add_argument("--stride", type=int, default=512, metavar="TOKENS")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
