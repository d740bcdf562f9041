"""The plan: what every device holds, and how many KV blocks the replica has.

A replica is a chain of stages: contiguous runs of layers on ordered devices (an encoder's layers come before its
decoder's). A device may stay empty, a stage has at least one layer. The first stage also holds the embedding, the last
the final norm and the head, each a copy of the small shared modules. Tied embeddings cost one copy on each stage that
uses them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Unpack, get_args

from placement.errors import DoesNotFit, PlacementError
from placement.footprint import Footprint, Module, Role, resident_bytes
from placement.hardware import Gpu, Inventory
from placement.kv import sequence_bytes
from placement.problem import Cut, Problem
from placement.question import Conditions, Order, Question, ask
from placement.reserve import Term
from placement.shortfall import shortfall
from placement.solver import Goal, Split, best, without_needless_resort
from placement.workload import Attention

__all__ = ["Conditions", "DoesNotFit", "Goal", "Order", "Plan", "Stage", "answer", "solve"]

STATE = "sequence state"
"""Name of the reserve's term for what recurrent layers keep of every running sequence."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One device's share: a contiguous run of layers and whatever else lives with them."""

    device: int
    """Index into the devices the plan was solved for; the loader's `cuda:{device}`. A CPU of last resort has the index
    behind the last GPU's."""
    gpu: Gpu
    layers: tuple[int, int]
    """First and past-last layer, counted through all stacks (an encoder's layers first)."""
    modules: tuple[str, ...]
    """Full dotted names, as in `device_map`; each module of the model is in exactly one stage."""
    copies: tuple[str, ...]
    """Modules owned by an earlier stage that this one holds a copy of as well (rotary tables, T5's position biases)."""
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
    sequence_bytes: int = 0
    """KV and recurrent state of one sequence of `max_context` tokens, in all stages."""
    window_aware_bytes: int = 0
    """The same in a cache that frees blocks behind sliding windows. The engine's does not: no capacity counts on it."""
    experts: bool = False
    """Fused experts are quantised too, once they are loaded."""
    head: bool = False
    """The head is quantised too, apart from an embedding that it is tied to."""
    embeddings: bool = False
    """The input embedding is quantised too, apart from a head that is tied to it."""
    attention: Attention = "torch"
    """What KV blocks are laid out for: FlashInfer's have heads of the sizes that it has kernels for."""

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
    goal: Goal = "throughput",
    **conditions: Unpack[Conditions],
) -> Plan:
    """The best plan for one replica on all of `gpus`.

    Args:
        footprint: the model, weighed.
        gpus: the replica's devices, in pipeline order.
        goal: throughput: the slowest stage within 5 % of the best possible, then the most KV blocks;
            capacity: the most KV blocks, then the fastest slowest stage;
            latency: the least time for one token through all stages, then the fewest stages, then the most KV blocks.
            Time is multiply-adds over the device's speed.
        conditions: see `Conditions`.

    Raises:
        DoesNotFit: what is demanded (one KV block at least) fits in no split.
        PlacementError: a value that makes no sense.
    """
    problem = Problem.of(ask(footprint, gpus, **conditions))
    plan = _answer(problem, goal)
    if plan is None:
        raise shortfall(problem)
    return plan


def answer(question: Question, goal: Goal = "throughput") -> Plan | None:
    """The best plan, or None where nothing fits: `solve` for who asks often and needs no reasons.

    Raises:
        PlacementError: an unknown goal.
    """
    return _answer(Problem.of(question), goal)


def _answer(problem: Problem, goal: Goal) -> Plan | None:
    if goal not in get_args(Goal):
        raise PlacementError(f"goal {goal!r} is not known; use one of {', '.join(get_args(Goal))}")
    problem = without_needless_resort(problem)  # prices differ where it is not needed
    split = best(problem, goal)
    return None if split is None else _price(problem, split)


def _price(problem: Problem, split: Split) -> Plan:
    question = problem.question
    footprint, workload = question.footprint, question.workload
    context = min(workload.max_context, split.blocks * workload.block_size)
    one, window_aware = (
        sequence_bytes(question.kv, context, kv_dtype=workload.kv_dtype, dtype=footprint.dtype, window_aware=aware)
        for aware in (False, True)
    )
    return Plan(
        model=footprint.model,
        quantization=footprint.quantization,
        double_quant=footprint.double_quant,
        dtype=footprint.dtype,
        kv_dtype=workload.kv_dtype,
        block_size=workload.block_size,
        num_blocks=split.blocks,
        max_context=context,
        stages=tuple(_stage(problem, cut, split.blocks) for cut in split.cuts),
        sequence_bytes=one,
        window_aware_bytes=window_aware,
        experts=footprint.experts,
        head=footprint.head,
        embeddings=footprint.embeddings,
        attention=question.attention,
    )


def _stage(problem: Problem, cut: Cut, blocks: int) -> Stage:
    question, first = problem.question, cut.start == 0
    footprint, layers = question.footprint, range(cut.start, cut.end)
    beside = {role: [m for i, m in footprint.beside if i in layers and m.role == role] for role in ("first", "last")}
    shared = footprint.with_role("shared")
    modules = (*beside["first"], *footprint.layers[cut.start : cut.end], *(shared if first else ()), *beside["last"])
    copies = (*(() if first else shared), *_borrowed(footprint, cut))
    kv_block_bytes = problem.kv_block_bytes(cut)
    reserve = problem.reserves[cut.device].terms(
        last=cut.end == problem.layers, blocks=blocks, kv_block_bytes=kv_block_bytes
    )
    if state := problem.state_bytes(cut):
        why = f"recurrent and convolution state of {question.workload.max_sequences} sequences in these layers"
        reserve += (Term(STATE, state, why),)
    return Stage(
        device=cut.device,
        gpu=question.devices[cut.device],
        layers=(cut.start, cut.end),
        modules=tuple(module.name for module in modules),
        copies=tuple(module.name for module in copies),
        weight_bytes=problem.weight_bytes(cut),
        reserve=reserve,
        kv_block_bytes=kv_block_bytes,
        budget_bytes=question.budgets[cut.device],
        weights=_weights((*modules, *copies)),
    )


def _borrowed(footprint: Footprint, cut: Cut) -> tuple[Module, ...]:
    """What the stage's layers need of the first layer of their stack, where that is on another stage."""
    own = {tensor.storage for layer in footprint.layers[cut.start : cut.end] for tensor in layer.tensors}
    lent = {module.name: module for modules in footprint.lent[cut.start : cut.end] for module in modules}
    return tuple(module for module in lent.values() if not own & {tensor.storage for tensor in module.tensors})


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
