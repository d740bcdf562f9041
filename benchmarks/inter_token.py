"""The engine alone: time between the tokens of streams while long prompts arrive, against the same without them.

    python -m benchmarks.inter_token                      8B shape, NF4, 32 streams, prompts of 8,192 tokens

A prompt arrives as soon as the one before it has its first token, so that one is always being computed. The goal is a
p99 of at most three times the p50 that the streams have while prompts arrive.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.checkpoint import FOLDER, SHAPES, write
from deployments.compare.throughput import random_prompts
from deployments.engine.loader import load
from deployments.engine.loop import Engine
from deployments.engine.messages import EngineLimits
from deployments.protocol import GenerationRequest, Sampling
from placement import probe
from placement.footprint import footprint
from placement.hardware import virtual_cpu_devices
from placement.plan import solve


@dataclass(frozen=True, slots=True)
class Gaps:
    """Milliseconds between two tokens of a stream, over all streams."""

    p50_ms: float
    p99_ms: float
    max_ms: float
    tokens: int


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    options = _arguments().parse_args(argv)
    torch.manual_seed(0)
    engine = _engine(options)
    alone = min(options.output, 300)
    quiet, _ = watch(engine, options.streams, options.input, alone, prompts=0, prompt_tokens=0)
    busy, seconds = watch(
        engine, options.streams, options.input, options.output, prompts=options.prompts, prompt_tokens=options.prompt
    )
    engine.close()
    for name, gaps in (("alone", quiet), (f"{options.prompts} prompts of {options.prompt} tokens", busy)):
        print(
            f"{options.streams} streams, {name}: p50 {gaps.p50_ms:.2f} ms, p99 {gaps.p99_ms:.2f} ms "
            f"({gaps.p99_ms / gaps.p50_ms:.2f} times), longest {gaps.max_ms:.1f} ms, {gaps.tokens} tokens"
        )
    if seconds:
        print(f"a prompt has its first token after {statistics.median(seconds):.3f} s")
    if options.json:
        options.json.write_text(json.dumps({"alone": asdict(quiet), "busy": asdict(busy), "first_token_s": seconds}))
    return 0


def watch(
    engine: Engine, streams: int, input_tokens: int, output_tokens: int, *, prompts: int, prompt_tokens: int
) -> tuple[Gaps, list[float]]:
    """Gaps of `streams` requests while `prompts` prompts arrive one after another (or of all their tokens, with none),
    and the seconds that each prompt took to its first token."""
    tag = f"{prompts}x{prompt_tokens}"
    for i, ids in enumerate(random_prompts(engine, streams, input_tokens, f"streams {tag}")):
        engine.submit(_request(f"{tag}-stream-{i}", ids, output_tokens))
    last: dict[str, float] = {}
    while len(last) < streams:
        last |= {chunk.request_id: time.perf_counter() for chunk in engine.step()}
    waiting = list(enumerate(random_prompts(engine, prompts, prompt_tokens, f"prompts {tag}")))
    gaps: list[float] = []
    seconds: list[float] = []
    arriving, arrived = "", 0.0
    while engine.has_work() and (not prompts or len(seconds) < prompts):
        if waiting and not arriving:
            i, ids = waiting.pop(0)
            arriving, arrived = f"{tag}-prompt-{i}", time.perf_counter()
            engine.submit(_request(arriving, ids, 1))
        chunks = engine.step()
        now = time.perf_counter()
        for chunk in chunks:
            if chunk.request_id == arriving:
                seconds.append(now - arrived)
                arriving = ""
            elif chunk.request_id in last:
                if arriving or not prompts:
                    gaps.append(1e3 * (now - last[chunk.request_id]))
                last[chunk.request_id] = now
    for name in last:
        engine.abort(name)
    if len(seconds) < prompts or not gaps:
        raise RuntimeError(f"the streams ended before {prompts} prompts had arrived: raise --output or lower --prompts")
    gaps.sort()
    return Gaps(statistics.median(gaps), gaps[int(0.99 * (len(gaps) - 1))], gaps[-1], len(gaps)), seconds


def _request(name: str, ids: tuple[int, ...], output_tokens: int) -> GenerationRequest:
    return GenerationRequest(name, ids, Sampling(max_tokens=output_tokens, seed=0, temperature=0.0))


def _engine(options: argparse.Namespace) -> Engine:
    folder = write(options.shape, options.folder)
    plan = solve(
        footprint(folder, quantization=options.quantization),
        probe.cuda_gpus()[:1] or virtual_cpu_devices(("4GB",)),
        block_size=16,
        max_batch_tokens=options.max_batch_tokens,
        max_sequences=options.streams + 1,
        max_context=max(options.prompt + 16, options.input + options.output),
    )
    limits = EngineLimits(
        max_batch_tokens=options.max_batch_tokens,
        max_sequences=options.streams + 1,
        prefix_cache=False,
        threads=probe.cpu_cores(),
        prefill_chunk_tokens=options.chunk,
    )
    model = load(folder, plan, device_type=plan.stages[0].gpu.device_type, limits=limits)
    return Engine(model, plan, limits)


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Time between tokens while long prompts arrive.")
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--quantization", default="nf4")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--input", type=int, default=128, help="tokens of each stream's prompt")
    parser.add_argument("--output", type=int, default=1500, help="tokens that each stream produces at most")
    parser.add_argument("--prompts", type=int, default=6, help="that arrive, one after another")
    parser.add_argument("--prompt", type=int, default=8192, help="tokens of each")
    parser.add_argument("--max-batch-tokens", type=int, default=2048)
    parser.add_argument("--chunk", type=int, help="prompt tokens beside decodes; default: measured at the start")
    parser.add_argument("--json", type=Path)
    return parser


if __name__ == "__main__":
    sys.exit(main())
