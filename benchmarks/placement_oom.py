"""Random pools, planned, loaded and served at their heaviest, each in a process that may take no more than its plan.

    python -m benchmarks.placement_oom --seconds 150         on CUDA devices: models of up to a billion weights
    python -m benchmarks.placement_oom --device cpu          tiny ones on virtual devices, which nothing can cap

A case is a random model and a random pool. It is drawn until the plan says yes, and planned as a replica would plan it.
On CUDA the process's allocator is then capped, on every device, at the plan's budget less what the driver takes (the
CUDA context, and its part of CUDA graphs), so that one byte more ends it. It loads the model, and serves one request of
the longest context, then a full batch, and then one whose sequences share a long prefix, half of them half as long;
with every sampling setting that needs memory. Whatever goes wrong is printed, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, BloomConfig, FalconConfig, GPTJConfig, PreTrainedConfig
from transformers.utils.logging import disable_progress_bar

from benchmarks import heaviest
from benchmarks.child import ROOT
from benchmarks.placement_sweep import FAMILIES, config_of
from deployments.engine.loader import load
from deployments.engine.loop import Engine
from deployments.engine.messages import EngineLimits
from deployments.errors import ConfigError
from deployments.planning import plan_pool
from deployments.settings import PoolSettings
from placement.errors import DoesNotFit
from placement.plan import Plan, Stage
from placement.recipe import BLOCK
from placement.reserve import CONTEXT, GRAPHS, driver_bytes

Device = Literal["cpu", "cuda"]
OWN_ATTENTION = ("bloom", "falcon", "gptj")
"""Families that attend in code of their own, and so get the gather cache."""
SERVED = sorted(FAMILIES.keys() - {"gpt_oss", "deepseek_v2"} | set(OWN_ATTENTION))
"""Families that the engine serves at all sizes drawn here."""
QUANTISATIONS = ("nf4", "nf4+dq", "fp4", "fp4+dq", "int8", "16 bits")
FLASHINFER_FAMILIES = ("llama", "qwen2", "qwen3", "phi3")
"""With heads of 128 and in bfloat16 these need one build of FlashInfer's kernels, which the first case pays for."""
_CUDA: dict[str, tuple[int, ...]] = {
    "layers": (2, 24), "hidden": (256, 2560), "vocab": (1_000, 131_000), "weights": (10**6, 10**9),
    "sequences": (8, 64, 256), "tokens": (256, 1024, 2048), "context": (512, 2048, 8192),
}  # fmt: skip
_CPU: dict[str, tuple[int, ...]] = {
    "layers": (1, 4), "hidden": (32, 128), "vocab": (100, 1_000), "weights": (10**3, 10**6),
    "sequences": (2, 8), "tokens": (16, 64), "context": (64, 120),
}  # fmt: skip
"""What is drawn: the first four from a range, the others of a list."""
_MOST_TOKENS = 60_000
"""Held at once by the full batch, so that a case takes seconds."""
_TRIES = 50
_OUTPUT = 8


@dataclass(frozen=True)
class Case:
    """What is planned, loaded and served."""

    family: str
    config: PreTrainedConfig
    pool: PoolSettings

    def __str__(self) -> str:
        c, pool = self.config, self.pool
        shape = f"{c.num_hidden_layers} x {c.hidden_size}, {c.num_attention_heads} heads, {c.vocab_size} tokens"
        caps = ", ".join(f"{int(size) / 1e9:.3f}" for size in pool.max_memory.values())
        double = " dq" if pool.double_quant else ""
        double += " head" if pool.quantize_head else ""
        double += " embeddings" if pool.quantize_embeddings else ""
        steps = f"{pool.max_sequences} sequences, steps of {pool.max_batch_tokens}, context {pool.max_context}"
        return (
            f"{self.family} ({shape}) {pool.quantization}{double} {pool.dtype}, KV {pool.kv_dtype}, {caps} GB, {steps}"
        )


def draw(rng: random.Random, device: Device, devices: int) -> Case:
    """A random case, the same for equal states of `rng`.

    Args:
        devices: the most that a replica has.
    """
    quantization = rng.choice(QUANTISATIONS)
    paged = device == "cuda" and rng.random() < 0.5
    dtype = "bfloat16" if paged else rng.choice(("bfloat16", "float16") if device == "cuda" else ("float32",))
    plain = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[dtype]
    family = rng.choice(FLASHINFER_FAMILIES if paged else SERVED)
    head_dims = (16, 32) if device == "cpu" else (128,) if paged else (80, 96)
    scale = _CPU if device == "cpu" else _CUDA
    sizes = _sizes(rng, rng.choice(head_dims), scale)
    config = own_attention(family, sizes, rng) if family in OWN_ATTENTION else config_of(family, sizes, rng)
    chosen = plain if quantization == "16 bits" else quantization.removesuffix("+dq")
    pool = PoolSettings.model_validate(
        {
            "device": device,
            "quantization": chosen,
            "double_quant": quantization.endswith("+dq"),
            "quantize_head": chosen != plain and rng.random() < 0.3,
            "quantize_embeddings": chosen != plain and _blocks(family, config) and rng.random() < 0.3,
            "dtype": "auto" if chosen == plain else dtype,
            "kv_dtype": "auto" if paged else rng.choice(("auto", "fp8")),
            "block_size": rng.choice((16, 32)),
            "max_sequences": rng.choice(scale["sequences"]),
            "max_batch_tokens": rng.choice(scale["tokens"]),
            "max_context": rng.choice(scale["context"]),
            "max_memory": _caps(rng, weights_of(config), chosen, rng.randint(1, devices), device),
            "threads": 1,
        }
    )
    return Case(family, config, pool)


def own_attention(family: str, sizes: Mapping[str, Any], rng: random.Random) -> PreTrainedConfig:
    """A model of these sizes, as far as a family of `OWN_ATTENTION` knows them."""
    sizes = {**sizes, **{f"{kind}_token_id": 0 for kind in ("bos", "eos", "pad")}}
    heads, head_dim, inner = sizes["num_attention_heads"], sizes.pop("head_dim"), sizes.pop("intermediate_size")
    kv_heads = sizes.pop("num_key_value_heads")
    if family == "bloom":  # its MLP is four times as wide as its hidden states, always
        return BloomConfig(**sizes)
    if family == "falcon":
        grouped = rng.random() < 0.5  # else one KV head for all
        return FalconConfig(
            **sizes, num_kv_heads=kv_heads if grouped else 1, new_decoder_architecture=grouped, ffn_hidden_size=inner
        )
    del sizes["tie_word_embeddings"]  # its head has a bias
    names = {"n_embd": sizes.pop("hidden_size"), "n_layer": sizes.pop("num_hidden_layers"), "n_head": heads}
    names |= {"n_positions": sizes.pop("max_position_embeddings"), "n_inner": inner, "rotary_dim": head_dim // 2}
    del sizes["num_attention_heads"]
    return GPTJConfig(**sizes, **names, tie_word_embeddings=False)


def _blocks(family: str, config: PreTrainedConfig) -> bool:
    """Whether the embedding is a plain one whose rows are whole blocks of quantisation."""
    return family != "gemma2" and config.hidden_size % BLOCK == 0


def weights_of(config: PreTrainedConfig) -> int:
    """Roughly; an upper bound for the families here."""
    experts = getattr(config, "num_local_experts", None) or 1
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    layer = 4 * config.hidden_size**2 + 3 * experts * config.hidden_size * inner
    return int(config.num_hidden_layers * layer + 2 * config.vocab_size * config.hidden_size)


def _sizes(rng: random.Random, head_dim: int, scale: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    while True:
        kv_heads, group = rng.choice((1, 2, 4, 8)), rng.choice((1, 2, 4))
        hidden, layers = kv_heads * group * head_dim, rng.randint(*scale["layers"])
        inner, vocab = hidden * rng.randint(2, 4), rng.randrange(*scale["vocab"])
        weights = layers * (4 * hidden**2 + 3 * hidden * inner) + 2 * vocab * hidden
        if all(low <= size <= high for size, (low, high) in ((hidden, scale["hidden"]), (weights, scale["weights"]))):
            break
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": kv_heads * group,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": inner,
        "vocab_size": vocab,
        "max_position_embeddings": max(scale["context"]),
        "tie_word_embeddings": rng.random() < 0.5,
    }


def _caps(rng: random.Random, weights: int, quantization: str, devices: int, device: Device) -> dict[int, int]:
    """About what the case needs, some of it too little, divided unevenly."""
    bits = {"int8": 9, "bf16": 16, "fp16": 16, "fp32": 32}.get(quantization, 6)
    beside = (0.3, 1.5) if device == "cuda" else (0.001, 0.01)
    parts = [rng.uniform(0.5, 1.5) for _ in range(devices)]
    need = weights * bits / 8 * rng.uniform(0.9, 1.6)
    return {i: int(need * part / sum(parts) + rng.uniform(*beside) * 1e9) for i, part in enumerate(parts)}


def run(seed: int, number: int, device: Device, devices: int) -> dict[str, Any]:
    """Draw case `number` until the plan says yes, and serve it in this process."""
    rng, refused = random.Random(f"{seed}:{number}"), 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        while True:
            case = draw(rng, device, devices)
            case.config.save_pretrained(folder)
            try:
                plan, _ = plan_pool("random", folder, case.pool)
                break
            except ConfigError as error:
                refused += 1
                if not isinstance(error.__cause__, DoesNotFit) or refused == _TRIES:
                    raise
        try:
            served = serve(case, plan, folder, device)
        except torch.OutOfMemoryError as error:
            served = {"out_of_memory": " ".join(str(error).split())}
    allowed = [_allowed(plan, stage) for stage in plan.stages]
    return {"case": str(case), "refused": refused, "allowed": allowed, "capacity": plan.capacity_tokens, **served}


def serve(case: Case, plan: Plan, folder: Path, device: Device) -> dict[str, Any]:
    """Load a random model of the case's config and serve its heaviest steps; the tokens served, and per device the
    most bytes that the allocator had (CUDA).

    Raises:
        torch.OutOfMemoryError: the plan's budget is not enough.
    """
    _write(case.config, folder, device)
    if device == "cuda":
        for stage in plan.stages:
            total = torch.cuda.get_device_properties(stage.device).total_memory
            torch.cuda.set_per_process_memory_fraction(_allowed(plan, stage) / total, stage.device)
            torch.cuda.reset_peak_memory_stats(stage.device)
    pool = case.pool
    limits = EngineLimits(pool.batch_tokens(device), pool.max_sequences, prefix_cache=True, threads=1)
    model = load(folder, plan, device_type=device, limits=limits)
    engine = Engine(model, plan, limits)
    try:
        tokens = 0
        for prompts in _waves(engine.vocab_size, plan, pool.max_sequences):
            heaviest.serve(engine, prompts, _OUTPUT)
            tokens += sum(map(len, prompts))
        engine.check_integrity()
    finally:
        engine.close()
    held = [torch.cuda.max_memory_reserved(stage.device) for stage in plan.stages] if device == "cuda" else []
    return {"attention": model.attention, "tokens": tokens, "held": held}


def _write(config: PreTrainedConfig, folder: Path, device: Device) -> None:
    torch.manual_seed(0)
    with torch.device(device):
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    if device == "cuda":
        torch.cuda.empty_cache()


def _allowed(plan: Plan, stage: Stage) -> int:
    """Bytes of a stage's budget that torch's allocator may have: all but what the driver takes."""
    terms = {term.name: term.bytes for term in stage.reserve}
    if CONTEXT not in terms:  # no GPU
        return stage.budget_bytes
    driver = driver_bytes(plan.stages[-1].layers[1] if GRAPHS in terms else 0)
    return stage.budget_bytes - terms[CONTEXT] - driver


def _waves(vocab: int, plan: Plan, max_sequences: int) -> Iterator[list[tuple[int, ...]]]:
    """Prompts of the longest request alone; of as many as run at once; and of a long one, then of as many that share it
    with it, every other one half of it: what they hold fits, what is gathered for them all may not."""
    rng = random.Random(0)
    longest = plan.max_context - _OUTPUT
    tokens = min(_MOST_TOKENS, plan.capacity_tokens)
    sequences = max(1, min(max_sequences, tokens // (2 * plan.block_size + _OUTPUT)))
    length = max(1, min(longest, tokens // sequences - _OUTPUT - plan.block_size))
    for count, size in ((1, max(1, longest)), (sequences, length)):
        yield [tuple(rng.randrange(vocab) for _ in range(size)) for _ in range(count)]
    own = 2 * plan.block_size + _OUTPUT
    shared = tuple(rng.randrange(vocab) for _ in range(max(2, min(longest - 1, tokens // 2) // 2 * 2)))
    yield [shared]
    count = max(1, min(max_sequences, (tokens - len(shared)) // own))
    yield [(*shared[: len(shared) // (1 + i % 2)], rng.randrange(vocab)) for i in range(count)]


def in_child(seed: int, number: int, device: Device, devices: int) -> dict[str, Any]:
    """`run` in a process of its own; a process that fails gives the end of its errors."""
    case = json.dumps([seed, number, device, devices])
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.placement_oom", "--child", case]
    begun = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        found: dict[str, Any] = {"failed": done.stderr.strip()[-1500:] or f"ended with code {done.returncode}"}
    else:
        found = json.loads(done.stdout.strip().splitlines()[-1])
    return {"number": number, "seconds": time.monotonic() - begun, **found}


def sweep(options: argparse.Namespace, devices: int) -> Iterator[dict[str, Any]]:
    """Cases as their workers end; each is printed when it ends."""
    begun, numbers = time.monotonic(), itertools.count()

    def worker(_: int) -> list[dict[str, Any]]:
        found = []
        while time.monotonic() - begun < options.seconds and (number := next(numbers)) < options.cases:
            found.append(in_child(options.seed, number, options.device, devices))
            print(line(found[-1]), flush=True)
        return found

    with ThreadPoolExecutor(options.workers) as pool:
        for found in pool.map(worker, range(options.workers)):
            yield from found


def line(result: dict[str, Any]) -> str:
    """One case, for people to read."""
    head = f"case {result['number']:3d} {result['seconds']:6.1f} s"
    if "failed" in result:
        return f"{head} FAILED: {result['failed']}"
    if "out_of_memory" in result:
        return f"{head} OUT OF MEMORY: {result['case']}: {result['out_of_memory']}"
    used = ", ".join(f"{100 * held / may:.1f} %" for held, may in zip(result["held"], result["allowed"], strict=False))
    served = f"{result['tokens']:,} tokens of prompts, room for {result['capacity']:,}"
    return (
        f"{head} {f'took {used} of its part' if used else 'served'}: {result['case']}; {result['attention']}; {served}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print every case and their sum; exit code 1 when one went wrong, or none was served."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no case later than this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=max(1, min(6, (os.cpu_count() or 1) // 2)), help="at once")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    disable_progress_bar()
    if options.child:
        print(json.dumps(run(*json.loads(options.child))))
        return 0
    devices = torch.cuda.device_count() if options.device == "cuda" else 3
    if not devices:
        sys.exit("placement_oom needs a CUDA device; --device cpu runs tiny models on virtual ones")
    results = list(sweep(options, devices))
    short = sum("out_of_memory" in result for result in results)
    failed = sum("failed" in result for result in results)
    refused = sum(result.get("refused", 0) for result in results)
    print(
        f"seed {options.seed}: {refused} refused by the plan, {len(results)} planned and run: {short} out of memory, "
        f"{failed} failed otherwise, {len(results) - short - failed} served"
    )
    return int(short + failed > 0 or not results)


if __name__ == "__main__":
    sys.exit(main())
