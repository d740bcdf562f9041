"""The engine alone, on the GPUs: tokens/s, time per step against the memory floor, and where a step's time goes.

    python -m benchmarks.engine_throughput                              8B shape, NF4, one GPU
    python -m benchmarks.engine_throughput --quantization nf4,int8,bf16 --profile 1,64 --generate 1,8
    python -m benchmarks.engine_throughput --stages 2 --layers 8,24     two GPUs, a quarter of the layers on the first
    python -m benchmarks.engine_throughput --quantization nf4,nf4+invariant             what batch_invariant costs

Requests arrive at once, with random prompts of `--input` tokens that share nothing, and each produces `--output` tokens
greedily. The floor of a decode step is the bytes that it must read (the weights once, and the KV cache of all its
sequences at half of the output) over the bandwidth of a large copy on this GPU. It does not read an encoder's weights.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.checkpoint import FOLDER, SHAPES, asked, write
from benchmarks.kernel_classes import kernel_class
from benchmarks.products import copy_bandwidth
from benchmarks.trace_picture import STEP
from deployments.checkpoint import is_encoder_decoder
from deployments.compare.throughput import Burst, Step, burst, random_prompts
from deployments.engine.cuda_pipeline import CudaPipeline
from deployments.engine.garbage import settle_garbage
from deployments.engine.loader import load, quantization_config
from deployments.engine.loop import Engine
from deployments.engine.messages import EngineLimits
from deployments.engine.pipeline import Pipeline
from deployments.protocol import GenerationRequest, Sampling
from placement import probe
from placement.footprint import Footprint, footprint
from placement.hardware import virtual_cpu_devices
from placement.plan import Plan, solve


@dataclass(frozen=True, slots=True)
class Measured:
    """One concurrency."""

    concurrency: int
    tokens_per_s: float
    step_ms: float
    """Median of the steps in which all sequences decode."""
    floor_ms: float
    first_token_s: float
    """Median over requests."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    options = _arguments().parse_args(argv)
    torch.manual_seed(0)
    folder = write(options.shape, options.folder)
    results: dict[str, Any] = {"shape": options.shape, "input": options.input, "output": options.output, "runs": {}}
    bandwidth = copy_bandwidth()
    print(f"{_machine()}; a large copy moves {bandwidth / 1e12:.2f} TB/s", flush=True)
    if options.steps:
        options.steps.write_text("quantization,ms,tokens,running\n")
    for quantization in options.quantization.split(","):
        results["runs"][quantization] = _measure(folder, quantization, options, bandwidth)
        if options.json:
            options.json.write_text(json.dumps(results, indent=1))
    return 0


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="The engine alone, without Serve and HTTP.")
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the checkpoint is kept")
    parser.add_argument(
        "--quantization",
        default="nf4",
        help="one or several, with commas between; nf4+dq: double quantisation; nf4+experts: fused experts too; "
        "nf4+invariant: batch_invariant; gptq, awq: as the shape is packed",
    )
    parser.add_argument("--concurrency", default="1,8,32,64,128,256")
    parser.add_argument("--input", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--output", type=int, default=128, help="tokens that each request produces")
    parser.add_argument("--stages", type=int, default=1, help="GPUs of the replica")
    parser.add_argument("--layers", help="layers of each stage, such as 8,24; default: as the solver splits them")
    parser.add_argument("--max-batch-tokens", type=int, default=2048)
    parser.add_argument("--chunk", type=int, help="prompt tokens beside decodes; default: measured at the start")
    parser.add_argument("--kernels", choices=("headroom", "bitsandbytes"), default="headroom", help="of the linears")
    parser.add_argument("--generate", default="", help="concurrencies for transformers' generate() as well")
    parser.add_argument("--profile", default="", help="concurrencies whose decode step is shown by kernel class")
    parser.add_argument("--trace", type=Path, help="write a Chrome trace of the profiled steps here")
    parser.add_argument("--steps", type=Path, help="write a CSV line per step of the largest concurrency here")
    parser.add_argument("--json", type=Path)
    return parser


def _measure(folder: Path, quantization: str, options: argparse.Namespace, bandwidth: float) -> dict[str, Any]:
    concurrencies = _numbers(options.concurrency)
    name, ways = _parse(quantization)
    weighed = footprint(folder, **asked(options.shape, name), double_quant="dq" in ways, experts="experts" in ways)
    plan = _plan(weighed, options, max(concurrencies))
    began = time.monotonic()
    limits = _limits(options, max(concurrencies), invariant="invariant" in ways)
    model = load(folder, plan, device_type=plan.stages[0].gpu.device_type, limits=limits)
    loaded = time.monotonic()
    engine = Engine(model, plan, limits)
    settle_garbage()
    print(
        f"\n{quantization}, {len(plan.stages)} stages of {[b - a for a, b in (s.layers for s in plan.stages)]} layers, "
        f"attention by {model.attention}: loaded in {loaded - began:.1f} s, "
        f"ready {time.monotonic() - loaded:.1f} s later",
        flush=True,
    )
    results: dict[str, Any] = {"load_s": loaded - began, "engine": [], "generate": []}
    burst(engine, 2, options.input, min(8, options.output), tag="warm-up")
    for concurrency in concurrencies:
        context = options.input + options.output // 2
        floor = _floor_s(plan, concurrency, context, bandwidth, _encoder_bytes(plan, weighed))
        measured, done = _run(engine, concurrency, options, floor)
        if options.steps and concurrency == max(concurrencies):
            _append(options.steps, quantization, done.steps)
        results["engine"].append(asdict(measured))
        print(
            f"{concurrency:5d} requests: {measured.tokens_per_s:8.0f} tokens/s, step {measured.step_ms:6.2f} ms, "
            f"floor {measured.floor_ms:5.2f} ms, first token {measured.first_token_s:5.2f} s",
            flush=True,
        )
    results["stages"] = [_stages(engine.pipeline, concurrency) for concurrency in concurrencies]
    for concurrency in _numbers(options.profile):
        _profile(engine, concurrency, options)
    engine.close()
    del engine, model
    gc.unfreeze()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if options.generate:
        results["generate"] = _generate(folder, plan, options)
    return results


def _parse(quantization: str) -> tuple[str, set[str]]:
    """`nf4+invariant` -> nf4, and how it is served."""
    name, *ways = quantization.split("+")
    if unknown := set(ways) - {"dq", "experts", "invariant"}:
        sys.exit(f"{quantization}: +{' +'.join(sorted(unknown))} is unknown; there are +dq, +experts and +invariant")
    return name, set(ways)


def _plan(weighed: Footprint, options: argparse.Namespace, most: int) -> Plan:
    devices = probe.cuda_gpus()[: options.stages] or virtual_cpu_devices(("4GB",) * options.stages)
    if len(devices) < options.stages:
        sys.exit(f"--stages {options.stages} needs as many GPUs, and {len(devices)} are visible")
    pins = {}
    if options.layers:
        counts = _numbers(options.layers)
        stages = [stage for stage, count in enumerate(counts) for _ in range(count)]
        pins = {"pins": {f"model.layers.{layer}": stage for layer, stage in enumerate(stages)}}
    return solve(
        weighed,
        devices,
        block_size=16,
        max_batch_tokens=options.max_batch_tokens,
        max_sequences=most,
        max_context=options.input + options.output,
        **pins,
    )


def _limits(options: argparse.Namespace, most: int, *, invariant: bool) -> EngineLimits:
    return EngineLimits(
        max_batch_tokens=options.max_batch_tokens,
        max_sequences=most,
        prefix_cache=True,
        threads=probe.cpu_cores(),
        prefill_chunk_tokens=options.chunk,
        kernels=options.kernels == "headroom",
        batch_invariant=invariant,
    )


def _run(engine: Engine, concurrency: int, options: argparse.Namespace, floor_s: float) -> tuple[Measured, Burst]:
    """All requests at once, to their end."""
    done = burst(engine, concurrency, options.input, options.output)
    return Measured(
        concurrency, done.tokens_per_s, done.step_ms, 1e3 * floor_s, statistics.median(done.first_token_s)
    ), done


def _stages(pipeline: Pipeline, concurrency: int) -> list[float]:
    """Milliseconds that each of several stages on GPUs takes for its share of the requests."""
    if pipeline.depth == 1 or not isinstance(pipeline, CudaPipeline):
        return []
    share = -(-concurrency // pipeline.depth)
    times = [time / 1e3 for time in pipeline.stage_microseconds(share)]
    print(
        f"{concurrency:5d} requests: a step of {share} takes its stages {', '.join(f'{ms:.2f}' for ms in times)} ms, "
        f"together {sum(times) / max(times):.2f} times the slowest",
        flush=True,
    )
    return times


def _append(path: Path, quantization: str, steps: Sequence[Step]) -> None:
    with path.open("a", newline="") as file:
        csv.writer(file).writerows((quantization, f"{step.ms:.3f}", step.tokens, step.running) for step in steps)


def _floor_s(plan: Plan, concurrency: int, context: int, bandwidth: float, encoder_bytes: Sequence[int]) -> float:
    """Bytes that the slowest stage reads in a decode step over the bandwidth; with as many steps as stages in flight,
    each stage reads its weights for a share of the sequences."""
    share = -(-concurrency // len(plan.stages))
    kv_tokens = share * context
    read = max(
        stage.weight_bytes - encoder + kv_tokens * stage.kv_block_bytes // plan.block_size
        for stage, encoder in zip(plan.stages, encoder_bytes, strict=True)
    )
    return read / bandwidth


def _encoder_bytes(plan: Plan, weighed: Footprint) -> list[int]:
    """Of each stage: its encoder layers."""
    sizes = {layer.name: layer.bytes for layer in weighed.layers if layer.stack == "encoder"}
    return [sum(sizes.get(name, 0) for name in stage.modules) for stage in plan.stages]


def _profile(engine: Engine, concurrency: int, options: argparse.Namespace) -> None:
    """Shares of a decode step by kernel class, over ten steps on the first device."""
    for i, prompt in enumerate(random_prompts(engine, concurrency, options.input, f"profile{concurrency}")):
        engine.submit(
            GenerationRequest(
                f"p{concurrency}-{i}", prompt, Sampling(max_tokens=options.output, seed=0, temperature=0.0)
            )
        )
    started: set[str] = set()
    while len(started) < concurrency:
        started.update(chunk.request_id for chunk in engine.step())
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        began = time.perf_counter()
        for _ in range(10):
            with torch.profiler.record_function(STEP):
                engine.step()
        wall = time.perf_counter() - began
    while engine.has_work():
        engine.step()
    shares: dict[str, float] = {}
    marks = (STEP, "ProfilerStep")  # which the profiler shows on the device too
    events = [e for e in profiler.key_averages() if e.self_device_time_total > 0 and not e.key.startswith(marks)]
    for event in events:
        name = kernel_class(event.key)
        shares[name] = shares.get(name, 0.0) + event.self_device_time_total / 1e4
    busy = sum(shares.values())
    print(f"      a step of {concurrency}: {1e2 * wall:.2f} ms, {busy:.2f} ms of it in kernels, summed over GPUs:")
    for name, ms in sorted(shares.items(), key=lambda item: -item[1]):
        print(f"        {name:18s} {ms:7.3f} ms  {100 * ms / busy:5.1f} %")
    for event in sorted(events, key=lambda e: -e.self_device_time_total)[:12]:
        print(f"          {event.self_device_time_total / 1e4:7.3f} ms x {event.count / 10:5.0f}  {event.key[:80]}")
    if options.trace:
        profiler.export_chrome_trace(str(options.trace.with_suffix(f".{concurrency}.json")))


def _generate(folder: Path, plan: Plan, options: argparse.Namespace) -> list[dict[str, float]]:
    """transformers' generate() on the same quantised weights, in batches; several GPUs by device_map="auto"."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    auto = AutoModelForSeq2SeqLM if is_encoder_decoder(folder) else AutoModelForCausalLM
    device_map = ("auto" if options.stages > 1 else {"": 0}) if torch.cuda.is_available() else {"": "cpu"}
    extra = {} if (config := quantization_config(plan)) is None else {"quantization_config": config}
    model = auto.from_pretrained(
        folder, dtype=getattr(torch, plan.dtype), device_map=device_map, local_files_only=True, **extra
    )
    results = []
    for concurrency in _numbers(options.generate):
        ids = torch.randint(3, model.config.vocab_size, (concurrency, options.input), device=model.device)
        for output in (4, options.output):
            with _timed() as seconds, torch.inference_mode():
                model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=output, min_new_tokens=output,
                    do_sample=False, pad_token_id=0,
                )  # fmt: skip
        rate = concurrency * options.output / seconds[0]
        results.append({"concurrency": concurrency, "tokens_per_s": rate})
        print(f"{concurrency:5d} requests: {rate:8.0f} tokens/s by generate()", flush=True)
    return results


@contextmanager
def _timed() -> Iterator[list[float]]:
    seconds: list[float] = []
    began = time.perf_counter()
    yield seconds
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds.append(time.perf_counter() - began)


def _machine() -> str:
    names = [gpu.name for gpu in probe.cuda_gpus()] or ["CPU"]
    return f"{len(names)} x {names[0]}, torch {torch.__version__}"


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


if __name__ == "__main__":
    sys.exit(main())
