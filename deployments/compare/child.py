"""Measures one quantisation: `python -m deployments.compare.child JOB ANSWER`, two JSON files.

In a process of its own, so that nothing of another one is in its memory.
"""

from __future__ import annotations

import math
import os
import re
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from deployments.checkpoint import is_encoder_decoder
from deployments.compare.throughput import burst
from deployments.compare.values import Failed, Job, Level, Measured, Memory, Quality, Quantised
from deployments.engine.garbage import settle_garbage
from deployments.engine.loader import LoadedModel, load, quantised_already, quantization_config, quantized_copy
from deployments.engine.loop import Engine
from deployments.engine.memory_watch import MemoryWatch
from deployments.engine.messages import EngineLimits, Tuning
from deployments.engine.perplexity import score
from deployments.engine.process import end_with
from deployments.errors import ConfigError, HeadroomError
from deployments.home import state_folder
from deployments.planning import plan_pool
from placement import probe
from placement.hardware import format_bytes
from placement.plan import Plan

_STATUS = Path("/proc/self/status")


def main(argv: Sequence[str]) -> int:
    """Measure the job in file `argv[1]`, and write the answer to file `argv[2]`."""
    from transformers.utils.logging import disable_progress_bar

    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    disable_progress_bar()
    job = Job.model_validate_json(Path(argv[1]).read_text(encoding="utf-8"))
    answer: Measured | Quantised | Failed
    try:
        answer = measure(job)
    except HeadroomError as error:
        answer = Failed(quantization=job.pool.quantization, reason=" ".join(str(error).split()))
    Path(argv[2]).write_text(answer.model_dump_json(), encoding="utf-8")
    return 0


def measure(job: Job) -> Measured | Quantised:
    """Plan, load, score the text, and run the bursts.

    Raises:
        ConfigError: it does not fit, the workload does not fit it, or the model is an encoder-decoder.
    """
    if is_encoder_decoder(job.folder):
        raise ConfigError(f"{job.model} is an encoder-decoder, and a text's perplexity is that of a decoder-only model")
    plan, device_type = plan_pool(job.model, job.folder, job.pool)
    check(job, plan)
    if (quantised := _quantise(job, plan) if device_type == "cpu" else None) is not None:
        return quantised
    ids = token_ids(job)
    limits = _limits(job, plan, device_type)
    before, began = status_bytes("VmRSS"), time.monotonic()
    model = load(job.folder, plan, device_type=device_type, cache_dir=job.cache, limits=limits)
    loaded = time.monotonic()
    if device_type == "cpu":
        _touch(model)
    quality = _quality(model, ids, job, plan, limits)
    scored = time.monotonic()
    engine = Engine(model, plan, limits)
    load_s = time.monotonic() - scored + loaded - began
    settle_garbage()
    levels = _levels(engine, job)
    taken = MemoryWatch([stage.device for stage in model.stages]).taken()
    engine.close()
    return Measured(
        quantization=plan.quantization,
        dtype=plan.dtype,
        devices=tuple(stage.gpu.name for stage in plan.stages),
        attention=model.attention,
        quantise_s=None,
        load_s=load_s,
        memory=memory(plan, sum(taken) if taken else status_bytes("VmHWM") - before),
        quality=quality,
        levels=levels,
    )


def check(job: Job, plan: Plan) -> None:
    """Refuse a workload that the plan has no room for, so that no row is measured with another one than the rest.

    Raises:
        ConfigError: a request or a window is longer than the longest sequence, or main memory is short.
    """
    workload = job.workload
    for need, options in ((workload.input + workload.output, "--input or --output"), (workload.window, "--window")):
        if need > plan.max_context:
            raise ConfigError(
                f"{need:,} tokens are needed at once, and {plan.max_context:,} are the most in {plan.quantization}; "
                f"lower {options}, or raise --max-memory"
            )
    stages = [stage for stage in plan.stages if stage.gpu.device_type == "cpu"]
    need = sum(stage.weight_bytes + stage.reserve_bytes + plan.kv_bytes(stage) for stage in stages)
    if need > (have := probe.available_memory()):
        raise ConfigError(
            f"{plan.quantization} may take {format_bytes(need)} of main memory, {format_bytes(have)} are available; "
            "lower --max-memory, or free some"
        )


def token_ids(job: Job) -> list[int]:
    """The text's, as the tokenizer gives them by default (with a BOS token where it has one).

    Raises:
        ConfigError: there are fewer than two, and none to be predicted.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job.folder, local_files_only=True)
    ids: list[int] = tokenizer(job.text.read_text(encoding="utf-8"))["input_ids"]
    if len(ids) < 2:
        raise ConfigError(f"{job.text.name} has {len(ids)} tokens, perplexity needs 2 at least; give a longer --text")
    return ids


def memory(plan: Plan, measured: int) -> Memory:
    """The plan's sums beside what was measured."""
    return Memory(
        weights=sum(stage.weight_bytes for stage in plan.stages),
        kv_cache=sum(plan.kv_bytes(stage) for stage in plan.stages),
        reserve=sum(stage.reserve_bytes for stage in plan.stages),
        measured=measured,
        capacity_tokens=plan.capacity_tokens,
    )


def status_bytes(field: str) -> int:
    """A size of this process from /proc: VmRSS is its resident memory, VmHWM the highest that was."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", _STATUS.read_text(encoding="ascii"), re.MULTILINE)
    if found is None:
        raise ConfigError(f"{_STATUS} has no {field}, which memory is measured by on the CPU; Linux is needed")
    return 1024 * int(found[1])


def _quantise(job: Job, plan: Plan) -> Quantised | None:
    """Have the quantised copy made where it is not kept yet; None: it is, or none is needed."""
    if (config := quantization_config(plan)) is None or quantised_already(job.folder):
        return None
    kept = set(job.cache.iterdir()) if job.cache.is_dir() else set()
    began = time.monotonic()
    made = quantized_copy(job.folder, plan, config, job.cache)
    return None if made in kept else Quantised(seconds=time.monotonic() - began)


def _limits(job: Job, plan: Plan, device_type: str) -> EngineLimits:
    return EngineLimits(
        max_batch_tokens=job.pool.batch_tokens(device_type),
        max_sequences=job.pool.max_sequences,
        prefix_cache=job.pool.prefix_cache,
        threads=job.pool.threads or max(1, probe.cpu_cores() // len(plan.stages)),
        kernels=job.pool.own_kernels,
        int8_threshold=job.pool.int8_threshold,
        batch_invariant=job.pool.batch_invariant,
        tuning=Tuning(state_folder() / "kernels", job.pool.tune_limit_s) if job.pool.tunes else None,
    )


def _touch(model: LoadedModel) -> None:
    """Write to the whole KV cache: on the CPU, memory is taken at the first write."""
    for cache in (cache for stage in model.stages for cache in stage.kv):
        cache.keys.zero_()
        cache.values.zero_()


def _quality(model: LoadedModel, ids: Sequence[int], job: Job, plan: Plan, limits: EngineLimits) -> Quality:
    """Before the engine is there, whose pipeline would hold the stages.

    The plan reserves room for the logits of as many rows as there may be sequences.
    """
    import torch

    torch.set_num_threads(limits.threads)
    workload, rows = job.workload, min(limits.max_batch_tokens, limits.max_sequences)
    found = score(
        model.decoder_only(), ids, window=workload.window, stride=workload.stride, block_size=plan.block_size, rows=rows
    )
    torch.cuda.empty_cache()  # on GPUs: what scoring took is not what serving takes
    if not math.isfinite(found.perplexity):
        raise ConfigError(
            f"the perplexity in {plan.quantization} ({plan.dtype}) is {found.perplexity}: its logits are of no use; "
            "choose another quantization"
        )
    return Quality(perplexity=found.perplexity, scored_tokens=found.tokens, text_tokens=len(ids))


def _levels(engine: Engine, job: Job) -> tuple[Level, ...]:
    workload = job.workload
    burst(engine, 2, workload.input, min(8, workload.output), tag="warm-up")
    levels = []
    for requests in workload.concurrency:
        done = burst(engine, requests, workload.input, workload.output)
        levels.append(
            Level(
                requests=requests,
                tokens_per_s=done.tokens_per_s,
                first_token_s=statistics.median(done.first_token_s),
                token_s=done.token_s,
                request_s=statistics.median(done.request_s),
            )
        )
    return tuple(levels)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
