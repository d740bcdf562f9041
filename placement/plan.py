"""The plan: what every device holds, and how many KV blocks the replica has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from placement.errors import DoesNotFit as DoesNotFit
from placement.hardware import Gpu
from placement.reserve import Term

Goal = Literal["throughput", "capacity", "latency"]


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
