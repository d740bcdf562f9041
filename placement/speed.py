"""Tokens per second of a plan: an estimate by the roofline, made before anything runs.

What counts are the ratios between plans; the figures themselves are rough. For one step of one slot a stage needs

    max(bytes read / 60 % of the bandwidth, 2 * tokens * multiply-adds / part of peak FLOP/s) + 10 us * layers

Bytes read are the weights of its layers and of the head (not of the embedding: a lookup), once, and the KV cache of the
slot's sequences. The part of peak is 50 % for 16-bit and 32-bit weights, and 20 % for quantised ones, which are
dequantised on the way (a Triton NF4 kernel on an H200 reached 205 of 989 TFLOP/s at 64 rows).

A replica of N stages keeps N slots in flight, each with an equal part of the sequences. All of them advance by one
token in

    max(sum of the stages' times + 30 us * hops between GPUs, slots * the slowest stage's time)

A mixture of experts counts as if every expert ran, attention's own arithmetic is left out, and a device without known
rates gets those of `placement.cards`; the CPU counts as 20 GB/s and 0.2 TFLOP/s whatever it is.
"""

from __future__ import annotations

from dataclasses import dataclass

from placement.cards import GB, rates
from placement.footprint import Footprint, Module, resident_bytes
from placement.hardware import Gpu
from placement.plan import Plan, Stage

BANDWIDTH_PERCENT = 60
FLOPS_PERCENT = {"bf16": 50, "fp16": 50, "fp32": 50}
QUANTISED_FLOPS_PERCENT = 20
LAYER_NS = 10_000
"""Of a layer whose kernels have next to nothing to do."""
HOP_NS = 30_000
"""Of moving a slot's hidden states from one GPU to the next."""

_CPU_RATES = (20 * GB, 200 * GB)
_SECOND = 10**9


@dataclass(frozen=True, slots=True)
class Speed:
    """Estimated tokens/s of one replica."""

    decode: int
    """Of all `sequences` together."""
    single: int
    """Of one sequence that is alone."""
    prefill: int
    """Prompt tokens, in full chunks."""
    sequences: int
    """That `decode` is for."""
    context: int
    """Tokens of KV cache that each sequence has."""


@dataclass(frozen=True, slots=True)
class _Load:
    """What one stage reads and multiplies for a step."""

    read_bytes: int
    work: int
    """Multiply-adds per token."""
    layers: int
    kv_token_bytes: int
    bandwidth: int
    flops: int

    def ns(self, tokens: int, kv_tokens: int) -> int:
        """Time of a step of `tokens` tokens that attend to `kv_tokens` of KV cache in all."""
        moved = self.read_bytes + kv_tokens * self.kv_token_bytes
        reading = moved * _SECOND // self.bandwidth
        return max(reading, 2 * tokens * self.work * _SECOND // self.flops) + LAYER_NS * self.layers


def estimate(
    footprint: Footprint, plan: Plan, *, context: int | None = None, sequences: int | None = None, chunk: int = 512
) -> Speed:
    """Estimated tokens/s of one replica that runs `plan`.

    Args:
        footprint: what the plan was solved for.
        plan: the plan.
        context: tokens of every sequence; None: the plan's longest.
        sequences: running at once; None: as many of that length as the KV cache holds, at least one.
        chunk: tokens of a prefill step.
    """
    if any(stage.gpu.device_type == "cuda" for stage in plan.stages):
        footprint = footprint.on_gpus()  # as the solver weighs it there
    context = context or plan.max_context
    sequences = sequences or max(1, plan.capacity_tokens // context)
    # The encoder of an encoder-decoder runs once, for the prompt; of any other model both steps run all layers.
    decoding = [_load(footprint, plan, stage, without="encoder") for stage in plan.stages]
    prompting = [_load(footprint, plan, stage, without="decoder") for stage in plan.stages]
    return Speed(
        decode=_decode(decoding, sequences, context),
        single=_decode(decoding, 1, context),
        prefill=chunk * _SECOND // max(load.ns(chunk, context) for load in prompting),
        sequences=sequences,
        context=context,
    )


def _decode(loads: list[_Load], sequences: int, context: int) -> int:
    slots = min(len(loads), sequences)
    each = -(-sequences // slots)
    times = [load.ns(each, each * context) for load in loads]
    return sequences * _SECOND // max(sum(times) + HOP_NS * (len(times) - 1), slots * max(times))


def _load(footprint: Footprint, plan: Plan, stage: Stage, *, without: str) -> _Load:
    here = {*stage.modules, *stage.copies}
    modules = tuple(module for module in footprint.modules if module.name in here and _runs(module, without))
    bandwidth, flops = _rates(stage.gpu)
    return _Load(
        read_bytes=resident_bytes(modules),
        work=sum(module.work for module in modules),
        layers=sum(module.role == "layer" for module in modules),
        kv_token_bytes=stage.kv_block_bytes // plan.block_size,
        bandwidth=bandwidth * BANDWIDTH_PERCENT // 100,
        flops=flops * FLOPS_PERCENT.get(plan.quantization, QUANTISED_FLOPS_PERCENT) // 100,
    )


def _runs(module: Module, without: str) -> bool:
    return module.role in ("layer", "last") and module.stack != without


def _rates(gpu: Gpu) -> tuple[int, int]:
    known = _CPU_RATES if gpu.device_type == "cpu" else rates(gpu.name, gpu.memory_bytes)
    return gpu.bandwidth or known[0], gpu.flops or known[1]
