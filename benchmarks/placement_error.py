"""What the plan says against what the GPUs hold: plan, load, serve the heaviest steps, and compare, GPU by GPU.

    python -m benchmarks.placement_error                                 the cases below that the visible GPUs allow
    python -m benchmarks.placement_error --case 8b:nf4 --case 8b:int8:0=20GiB,1=40GiB

A case is SHAPE:QUANTISATION[:CAPS]; `nf4+dq` has double quantisation, `nf4+experts` quantised experts, caps name
devices. A packed shape goes with what it is (mistral-7b-gptq:gptq). Each case runs in a process of its own. The
measured peak is what the device has taken from it at the end, CUDA context and libraries included (the allocator gives
nothing back), against everything that the plan accounts for.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import heaviest
from benchmarks.checkpoint import FOLDER, SHAPES, asked, write
from deployments.engine.loader import load
from deployments.engine.loop import Engine
from deployments.engine.messages import EngineLimits
from placement import probe
from placement.encoder_decoder import encodes
from placement.footprint import footprint
from placement.hardware import Gpu
from placement.plan import Plan, solve

ONE_GPU = (
    "1b:nf4",
    "1b:bf16",
    "8b:nf4",
    "8b:fp4",
    "8b:nf4+dq",
    "8b:int8",
    "8b:bf16",
    "8b:nf4:0=83.2GiB",
    "8b:bf16:0=83.2GiB",
    "14b:nf4:0=60GiB",
    "bloom-3b:nf4",
    "bloom-3b:int8:0=12GiB",
    "moe-7b:nf4+experts",
    "t5-3b:int8",
    "mistral-7b-gptq:gptq",
    "mistral-7b-awq:awq",
)
TWO_GPUS = (
    "8b:nf4:0=20GiB,1=20GiB",
    "8b:bf16:0=16GiB,1=60GiB",
    "14b:int8:0=20GiB,1=40GiB",
    "bloom-3b:nf4:0=5GiB,1=8GiB",
    "t5-3b:nf4:0=12GiB,1=20GiB",
    "mistral-7b-awq:awq:0=8GiB,1=12GiB",
)
MAX_SEQUENCES, MAX_BATCH_TOKENS = 256, 2048
_PROMPT = 4096
"""Tokens of the longest prompt: more than a step takes, so the chunks after the first attend over a context too."""
_SHORT, _OUTPUT, _DECODED = 24, 8, 64
"""Tokens of the other prompts, of all answers, and of an encoder-decoder's: enough for all to decode at once."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cases; exit code 1 when one is below what was measured."""
    parser = argparse.ArgumentParser(description="Predicted against measured bytes.")
    parser.add_argument("--case", action="append", help="SHAPE:QUANTISATION[:CAPS]; may be repeated")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        print(json.dumps(measure(options.child, options.folder)))
        return 0
    gpus = torch.cuda.device_count()
    if not gpus:
        sys.exit("placement_error needs a CUDA device: on the CPU, tests compare bytes with the plan")
    cases = options.case or [*ONE_GPU, *(TWO_GPUS if gpus > 1 else ())]
    print("case                          GPU   predicted    measured   error   KV tokens  ready s", flush=True)
    results, short = [], False
    for case in cases:
        result = _in_child(case, options.folder)
        results.append(result)
        for device, (predicted, measured) in enumerate(zip(result["predicted"], result["measured"], strict=True)):
            error = predicted / measured - 1
            short |= error < 0
            print(
                f"{case:28s} {device:4d} {predicted:11,d} {measured:11,d} {100 * error:+6.2f}% "
                f"{result['capacity_tokens']:11,d} {result['ready_s']:7.1f}",
                flush=True,
            )
        for line in result["parts"]:
            print(f"    {line}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    return int(short)


def measure(case: str, folder: Path) -> dict[str, Any]:
    """Plan, load and run one case in this process."""
    shape, _, _, caps = _read_case(case)
    path = write(shape, folder)
    torch.cuda.empty_cache()  # of what was written
    devices = probe.cuda_gpus()[: max(1, len(caps))]
    parts = [_used("context alone", devices_count=len(devices))]
    plan = plan_case(case, path, devices)
    began = time.monotonic()
    limits = EngineLimits(max_batch_tokens=MAX_BATCH_TOKENS, max_sequences=MAX_SEQUENCES, prefix_cache=True, threads=1)
    model = load(path, plan, device_type="cuda", limits=limits)
    loaded_s = time.monotonic() - began
    parts.append(_used(f"loaded after {loaded_s:.1f} s, with the KV cache", devices_count=len(devices)))
    engine = Engine(model, plan, limits)
    ready_s = time.monotonic() - began
    parts.append(_used(f"warm after {ready_s:.1f} s", devices_count=len(devices)))
    if model.encodes:
        _serve(engine, _whole_prompts(plan), output=_DECODED)
    else:
        _serve(engine, _prompts(plan), output=_OUTPUT)
    parts.append(_used("after the heaviest steps", devices_count=len(devices)))
    measured = [total - free for free, total in map(torch.cuda.mem_get_info, range(len(devices)))]
    predicted = [stage.weight_bytes + stage.reserve_bytes + plan.kv_bytes(stage) for stage in plan.stages]
    parts += [
        f"GPU {stage.device}: weights {stage.weight_bytes:,} KV {plan.kv_bytes(stage):,} "
        + " ".join(f"{term.name} {term.bytes:,}" for term in stage.reserve)
        for stage in plan.stages
    ]
    return {
        "case": case,
        "predicted": predicted,
        "measured": [measured[stage.device] for stage in plan.stages],
        "capacity_tokens": plan.capacity_tokens,
        "ready_s": ready_s,
        "parts": parts,
    }


def plan_case(case: str, path: Path, devices: Sequence[Gpu]) -> Plan:
    """Of an encoder-decoder, a plan that has room for the longest sequence: it serves no other here."""
    shape, name, options, caps = _read_case(case)
    weighed = footprint(path, **asked(shape, name), double_quant="dq" in options, experts="experts" in options)
    context = SHAPES[shape]["max_position_embeddings"]
    return solve(
        weighed,
        devices,
        block_size=16,
        max_batch_tokens=MAX_BATCH_TOKENS,
        max_sequences=MAX_SEQUENCES,
        max_context=context,
        min_context=context if encodes(weighed) else None,
        max_memory={int(device): size for device, size in caps.items()},
    )


def _read_case(case: str) -> tuple[str, str, list[str], dict[str, str]]:
    """Its shape, its quantisation, the options of that, and caps by device."""
    shape, quantization, *rest = case.split(":")
    name, *options = quantization.split("+")
    return shape, name, options, dict(part.split("=") for part in rest[0].split(",")) if rest else {}


def _prompts(plan: Plan) -> list[int]:
    """Lengths: the longest prefill, and a full batch of short ones."""
    length = min(_PROMPT, plan.max_context - _OUTPUT)
    held = -(-(length + _OUTPUT + 1) // plan.block_size), -(-(_SHORT + _OUTPUT + 1) // plan.block_size)
    return [length] + [_SHORT] * min(MAX_SEQUENCES, (plan.num_blocks - held[0]) // held[1])


def _whole_prompts(plan: Plan) -> list[int]:
    """Lengths: of an encoder-decoder, which gathers in each step what all sequences hold, the longest for all."""
    sequences = min(MAX_SEQUENCES, plan.capacity_tokens // plan.max_context)
    return [plan.max_context - _DECODED] * sequences


def _serve(engine: Engine, lengths: Sequence[int], *, output: int) -> None:
    """Random prompts of these lengths at once."""
    draw = random.Random(0)
    prompts = [tuple(draw.randrange(3, engine.vocab_size) for _ in range(length)) for length in lengths]
    heaviest.serve(engine, prompts, output)


def _used(when: str, *, devices_count: int) -> str:
    parts = []
    for device in range(devices_count):
        torch.cuda.synchronize(device)
        free, total = torch.cuda.mem_get_info(device)
        reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        parts.append(
            f"GPU {device}: {total - free:,} taken, {total - free - reserved:,} of it outside torch's allocator, "
            f"which has {reserved:,} ({allocated:,} in use, {peak:,} at most)"
        )
    return f"{when}: " + "; ".join(parts)


def _in_child(case: str, folder: Path) -> dict[str, Any]:
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "benchmarks.placement_error",
        "--child",
        case,
        "--folder",
        str(folder),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{case} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


if __name__ == "__main__":
    sys.exit(main())
