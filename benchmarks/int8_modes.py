"""The ways of computing in int8: speed, perplexity, and whether one request's answer depends on the others.

    python -m benchmarks.int8_modes                           the embedded model
    python -m benchmarks.int8_modes FOLDER --concurrency 1,64

| mode | activations | products by |
|---|---|---|
| weight-only | the compute dtype | Headroom's kernels; GPUs alone |
| 8 bits | int8, row by row | bitsandbytes (`kernels: bitsandbytes`; on the CPU int8 always is) |
| LLM.int8() | int8, features with a value over the threshold in 16 bits | bitsandbytes (`int8_threshold: 6`) |

"changed" counts greedy answers that are other ones when all prompts are served together than when each is served alone.
Kernels that round by the size of a batch change some too: the first row on a GPU, and `bf16` beside them, say how many.
"""

from __future__ import annotations

import argparse
import gc
import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from deployments import store
from deployments.compare.command import TEXT
from deployments.compare.throughput import burst, random_prompts
from deployments.engine.loader import load
from deployments.engine.loop import Engine
from deployments.engine.messages import EngineLimits
from deployments.engine.perplexity import score
from deployments.home import state_folder
from deployments.planning import plan_pool
from deployments.protocol import GenerationRequest, Sampling
from deployments.settings import PoolSettings

MODES: dict[str, dict[str, Any]] = {
    "unquantised": {"quantization": "bf16"},
    "weight-only": {"quantization": "int8"},
    "8 bits": {"quantization": "int8", "kernels": "bitsandbytes"},
    "LLM.int8()": {"quantization": "int8", "int8_threshold": 6.0},
}
_WINDOW = 512
_PROMPT, _ANSWER = 24, 24
"""Tokens of those that are served alone and together."""


@dataclass(frozen=True)
class Found:
    """What a mode measured."""

    tokens_per_s: tuple[float, ...]
    perplexity: float
    changed: int


def measure(name: str, folder: Path, ids: Sequence[int], options: argparse.Namespace) -> Found:
    """Load the model as a pool of this mode would, and measure."""
    pool = PoolSettings.model_validate({"device": options.device, "max_context": 2048, **MODES[name]})
    plan, device_type = plan_pool("model", folder, pool)
    limits = EngineLimits(
        max_batch_tokens=pool.batch_tokens(device_type),
        max_sequences=pool.max_sequences,
        prefix_cache=False,
        threads=options.threads,
        kernels=pool.own_kernels,
        int8_threshold=pool.int8_threshold,
    )
    model = load(folder, plan, device_type=device_type, cache_dir=state_folder() / "quantized", limits=limits)
    quality = score(
        model.stages, ids, window=_WINDOW, stride=_WINDOW, block_size=plan.block_size, rows=min(256, _WINDOW)
    )
    engine = Engine(model, plan, limits)
    burst(engine, 2, 16, 4, tag="warm-up")
    speeds = tuple(burst(engine, n, options.input, options.output).tokens_per_s for n in options.concurrency)
    prompts = list(random_prompts(engine, options.prompts, _PROMPT, "determinism"))
    alone = [serve(engine, [prompt])[0] for prompt in prompts]
    together = serve(engine, prompts)
    engine.close()
    return Found(speeds, quality.perplexity, sum(a != b for a, b in zip(alone, together, strict=True)))


def serve(engine: Engine, prompts: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """Greedy answers of prompts that come at once."""
    answers: list[list[int]] = [[] for _ in prompts]
    for i, prompt in enumerate(prompts):
        engine.submit(GenerationRequest(f"{i}", prompt, Sampling(max_tokens=_ANSWER, seed=0, temperature=0.0)))
    while engine.has_work():
        for chunk in engine.step():
            if chunk.error:
                raise RuntimeError(chunk.error)
            answers[int(chunk.request_id)] += chunk.token_ids
    return answers


def main(arguments: Sequence[str]) -> int:
    """Print a line per mode."""
    options = _parser().parse_args(arguments)
    disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    folder = store.fetch(options.model, home=state_folder(), progress=lambda line: print(line, file=sys.stderr)).path
    if options.ids:
        ids = [(7919 * i) % 1000 for i in range(options.ids)]
    else:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        ids = tokenizer(TEXT.read_text(encoding="utf-8"))["input_ids"][: options.tokens]
    heads = [f"{n} at once" for n in options.concurrency]
    print(
        f"{options.model} on {options.device}: tokens/s; perplexity over {len(ids):,} tokens; {options.prompts} prompts"
    )
    print(f"{'':12}" + "".join(f"{head:>14}" for head in heads) + f"{'perplexity':>12}{'changed':>9}", flush=True)
    for name in MODES:
        if name == "weight-only" and options.device == "cpu":
            continue
        found = measure(name, folder, ids, options)
        gc.collect()
        torch.cuda.empty_cache()
        speeds = "".join(f"{speed:14,.1f}" for speed in found.tokens_per_s)
        shown = f"{found.perplexity:12.4f}" if math.isfinite(found.perplexity) else f"{'none':>12}"
        print(f"{name:12}{speeds}{shown}{found.changed:9}", flush=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.int8_modes", description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="demo", help="demo, a Hugging Face id, or a folder")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--concurrency", type=_numbers, default=(1, 8), metavar="N,N", help="default: 1,8")
    parser.add_argument("--input", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--output", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--prompts", type=int, default=8, help="served alone and together")
    parser.add_argument("--tokens", type=int, default=1024, help="of the text that perplexity is over")
    parser.add_argument(
        "--ids", type=int, help="instead of a text so many made-up tokens, for a folder without tokenizer"
    )
    parser.add_argument("--threads", type=int, default=1, help="on the CPU")
    return parser


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
