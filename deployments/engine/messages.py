"""What crosses the pipe between a replica and its engine process: one message each way per step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deployments.protocol import NO_CHANGE, CachedGranules, GenerationRequest, TokenChunk
from deployments.settings import PoolSettings
from placement.plan import Plan


@dataclass(frozen=True, slots=True)
class Tuning:
    """Kernels are tuned for shapes of weights that no table of this GPU has."""

    folder: Path
    """Where the tables are kept, below it by version."""
    limit_s: float


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What one replica's scheduler may do."""

    max_batch_tokens: int
    max_sequences: int
    prefix_cache: bool
    threads: int
    """Torch threads of each stage on the CPU."""
    granule_tokens: int | None = None
    """A multiple of the block size: reports say which granules of prompts are cached; None: they don't."""
    prefill_chunk_tokens: int | None = None
    """Prompt tokens in a step while other sequences decode, however many; None: as the pipeline finds best."""
    kernels: bool = True
    """Quantised linears on CUDA run on this project's kernels; False: on bitsandbytes'."""
    int8_threshold: float = 0.0
    """Above 0: LLM.int8(), by bitsandbytes, with this outlier threshold."""
    batch_invariant: bool = False
    """A row's bits don't depend on what else is in its step; see `deployments.engine.invariant`."""
    tuning: Tuning | None = None
    """None: the shipped tables are used as they are."""
    lookahead: Literal[0, 1] | None = None
    """Steps of a slot launched while the one before is unread; None is what is best on the device. CUDA has 1 always,
    and refuses 0."""


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """Everything an engine process needs to plan, load and start."""

    name: str
    """The model's, for messages and the plan."""
    model_dir: Path
    pool: PoolSettings
    replicas_here: int
    """Replicas that share this machine's cores."""
    cache_dir: Path
    """Where checkpoints quantised on the CPU are kept."""
    kernels_dir: Path | None = None
    """Where measured kernel configurations are kept; None: none are measured."""
    granule_tokens: int | None = None
    """In which cached prefixes are reported; a multiple of the pool's block size. None: they aren't."""


@dataclass(frozen=True, slots=True)
class Commands:
    """Replica to engine: what came in since the last message."""

    submit: tuple[GenerationRequest, ...] = ()
    abort: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Started:
    """Engine to replica, once: the model is loaded and checked."""

    plan: Plan
    attention: str
    """The attention backend in use."""
    load_s: float
    """Seconds from the spec to here."""


@dataclass(frozen=True, slots=True)
class Failed:
    """Engine to replica, last: the engine could not start, or can't go on."""

    message: str
    """One line."""


@dataclass(frozen=True, slots=True)
class Measured:
    """How the engine stands after a step."""

    step_s: float = 0.0
    """Seconds that the step took; 0 where there was none."""
    held_blocks: int = 0
    """In use, each once however many requests share it."""
    running: int = 0
    waiting: int = 0
    busy_s: tuple[float, ...] = ()
    """Seconds that each stage has computed since the start; empty where it is not measured (CUDA)."""
    gpu_bytes: tuple[int, ...] = ()
    """Taken on each stage's GPU by all processes, a few seconds ago; empty on the CPU."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """Engine to replica after each step."""

    chunks: tuple[TokenChunk, ...]
    held: tuple[tuple[str, int], ...]
    """(request id, KV blocks held) of requests that are new, or hold another number than in the report before."""
    cached_blocks: int
    """Blocks that only the prefix cache keeps."""
    preemptions: int
    """Since the start."""
    shared_blocks: int = 0
    """How much less than the sum of what requests hold is really held, because they share prefixes; whole granules
    count."""
    granules: CachedGranules = NO_CHANGE
    """Changes since the report before."""
    measured: Measured = Measured()
    gone: tuple[str, ...] = ()
    """Ids of requests that were in a report before, and have ended since."""
