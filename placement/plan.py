"""The plan: what every device holds, and how many KV blocks the replica has.

A replica is a chain of stages: contiguous runs of decoder layers on ordered devices. A device may stay empty, a stage
has at least one layer. The first stage also holds the embedding, the last the final norm and the head, each a copy of
the small shared modules. Tied embeddings cost one copy on each stage that uses them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from placement.errors import DoesNotFit, PlacementError
from placement.footprint import Footprint, Module, Role, resident_bytes
from placement.hardware import Gpu, Inventory, parse_bytes
from placement.kv import dtype_bytes
from placement.reserve import CUDA_CONTEXT_BYTES, Term, Workload
from placement.shortfall import shortfall
from placement.solver import Cut, Cuts, Goal, Problem

__all__ = ["DoesNotFit", "Goal", "Plan", "Stage", "solve"]


@dataclass(frozen=True, slots=True)
class Stage:
    """One device's share: a contiguous run of decoder layers and whatever else lives with them."""

    device: int
    """Index into the devices the plan was solved for; the loader's `cuda:{device}`."""
    gpu: Gpu
    layers: tuple[int, int]
    """First and past-last decoder layer."""
    modules: tuple[str, ...]
    """Full dotted names, as in `device_map`; each module of the model is in exactly one stage."""
    copies: tuple[str, ...]
    """Modules owned by the first stage that this one holds a copy of as well (rotary tables)."""
    weight_bytes: int
    """Parameters, buffers and quantisation state resident after loading, before the first forward."""
    reserve: tuple[Term, ...]
    """What is neither weight nor KV."""
    kv_block_bytes: int
    """One KV block in all layers of this stage: block_size * bytes per token."""
    budget_bytes: int
    """What weights, reserve and KV together may not exceed."""
    weights: tuple[Term, ...] = ()
    """`weight_bytes` by what they are for: embedding, layers, head, shared."""

    @property
    def reserve_bytes(self) -> int:
        """Sum of the reserve's terms."""
        return sum(term.bytes for term in self.reserve)

    @property
    def free_bytes(self) -> int:
        """Budget less weights and reserve: the room for KV blocks."""
        return self.budget_bytes - self.weight_bytes - self.reserve_bytes


@dataclass(frozen=True, slots=True)
class Plan:
    """Where each layer goes, what each device's every byte is for, and the replica's KV capacity."""

    model: str
    quantization: str
    double_quant: bool
    dtype: str
    """Compute dtype and dtype of what stays unquantised: "bfloat16", "float16" or "float32"."""
    kv_dtype: str
    block_size: int
    """Tokens per KV block."""
    num_blocks: int
    """KV blocks that requests may hold. Each stage also keeps one scratch block, for padded rows."""
    max_context: int
    """Longest prompt + output in tokens: the lesser of what was asked for and the capacity."""
    stages: tuple[Stage, ...]

    @property
    def capacity_tokens(self) -> int:
        """KV tokens the replica holds."""
        return self.num_blocks * self.block_size

    def kv_bytes(self, stage: Stage) -> int:
        """KV bytes of `stage`, the scratch block included."""
        return (self.num_blocks + 1) * stage.kv_block_bytes

    def unused_bytes(self, stage: Stage) -> int:
        """What `stage` leaves of its budget; never negative."""
        return stage.free_bytes - self.kv_bytes(stage)


def solve(
    footprint: Footprint,
    gpus: Inventory | Sequence[Gpu],
    *,
    block_size: int,
    max_batch_tokens: int,
    max_sequences: int,
    max_context: int | None = None,
    max_memory: Mapping[int, str | int] | None = None,
    goal: Goal = "throughput",
    dtype: str | None = None,
    kv_dtype: str | None = None,
) -> Plan:
    """The best plan for one replica on all of `gpus`.

    Args:
        footprint: the model, weighed.
        gpus: the replica's devices, in pipeline order.
        block_size: tokens per KV block.
        max_batch_tokens: token budget of one step.
        max_sequences: most sequences running at once.
        max_context: tokens of the longest sequence; None: what the model was made for.
        max_memory: cap per device index, bounding everything but the CUDA context.
        goal: throughput: the slowest stage within 5 % of the best possible, then the most KV blocks;
            capacity: the most KV blocks, then the fastest slowest stage;
            latency: the least time for one token through all stages, then the fewest stages, then the most KV blocks.
            Time is multiply-adds over the device's speed.
        dtype: must be the footprint's, where given.
        kv_dtype: of the KV cache; None: the footprint's dtype.

    Raises:
        DoesNotFit: not even one KV block would be left, whatever the split.
        PlacementError: a value that makes no sense.
    """
    devices = tuple(gpus.gpus if isinstance(gpus, Inventory) else gpus)
    if dtype is not None and dtype != footprint.dtype:
        raise PlacementError(f"the footprint was weighed with dtype {footprint.dtype}, not {dtype}")
    if goal not in get_args(Goal):
        raise PlacementError(f"goal {goal!r} is not known; use one of {', '.join(get_args(Goal))}")
    budgets = _budgets(devices, max_memory or {})
    context = footprint.geometry.max_context if max_context is None else max_context
    if context > footprint.geometry.max_context:
        raise PlacementError(
            f"max_context is {context} tokens, but {footprint.model} was made for "
            f"{footprint.geometry.max_context}; lower it"
        )
    if min(block_size, max_batch_tokens, max_sequences, context) < 1:
        raise PlacementError("block_size, max_batch_tokens, max_sequences and max_context must be at least 1")
    workload = Workload(block_size, max_batch_tokens, max_sequences, context, kv_dtype or footprint.dtype)
    dtype_bytes(workload.kv_dtype)
    problem = Problem.of(footprint, devices, budgets, workload)
    found = problem.best(goal)
    if found is None:
        raise shortfall(problem)
    return _price(problem, *found)


def _budgets(devices: tuple[Gpu, ...], max_memory: Mapping[int, str | int]) -> tuple[int, ...]:
    """What each device may hold in all; a cap bounds everything but the CUDA context."""
    if not devices:
        raise PlacementError("there is no device to plan for; give at least one GPU or virtual CPU device")
    if unknown := sorted(set(max_memory) - set(range(len(devices)))):
        raise PlacementError(
            f"max_memory names device {unknown[0]}, but there are {len(devices)}: 0 to {len(devices) - 1}"
        )
    budgets = []
    for index, gpu in enumerate(devices):
        context = CUDA_CONTEXT_BYTES if gpu.device_type == "cuda" else 0
        cap = parse_bytes(max_memory[index]) + context if index in max_memory else gpu.usable_bytes
        budgets.append(min(cap, gpu.usable_bytes))
    return tuple(budgets)


def _price(problem: Problem, cuts: Cuts, blocks: int) -> Plan:
    footprint, workload = problem.footprint, problem.workload
    return Plan(
        model=footprint.model,
        quantization=footprint.quantization,
        double_quant=footprint.double_quant,
        dtype=footprint.dtype,
        kv_dtype=workload.kv_dtype,
        block_size=workload.block_size,
        num_blocks=blocks,
        max_context=min(workload.max_context, blocks * workload.block_size),
        stages=tuple(_stage(problem, cut, blocks) for cut in cuts),
    )


def _stage(problem: Problem, cut: Cut, blocks: int) -> Stage:
    footprint, first, last = problem.footprint, cut.start == 0, cut.end == problem.layers
    shared = footprint.with_role("shared")
    modules = footprint.layers[cut.start : cut.end]
    if first:
        modules = footprint.with_role("first") + modules + shared
    if last:
        modules += footprint.with_role("last")
    kv_block_bytes = problem.kv_block_bytes(cut)
    return Stage(
        device=cut.device,
        gpu=problem.devices[cut.device],
        layers=(cut.start, cut.end),
        modules=tuple(module.name for module in modules),
        copies=() if first else tuple(module.name for module in shared),
        weight_bytes=problem.weight_bytes(cut),
        reserve=problem.reserves[cut.device].terms(last=last, blocks=blocks, kv_block_bytes=kv_block_bytes),
        kv_block_bytes=kv_block_bytes,
        budget_bytes=problem.budgets[cut.device],
        weights=_weights(modules if first else modules + shared),
    )


def _weights(modules: tuple[Module, ...]) -> tuple[Term, ...]:
    """A stage's weights by role. What two roles share (tied embeddings) counts with the first of them."""
    names: dict[Role, str] = {"first": "embedding", "layer": "layers", "last": "head", "shared": "shared"}
    terms: list[Term] = []
    held: tuple[Module, ...] = ()
    for role, name in names.items():
        group = tuple(module for module in modules if module.role == role)
        size = resident_bytes(held + group) - resident_bytes(held)
        what = f"{len(group)} layers" if role == "layer" else ", ".join(module.name for module in group)
        terms.append(Term(name, size, what))
        held += group
    return tuple(term for term in terms if term.bytes)
