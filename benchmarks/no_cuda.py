"""A replica's pipeline without a GPU: streams, events and graphs that do nothing, and stages without layers.

What is left is what the host does to launch a step: the pipeline, its lanes and links, attention's tables and the
sampler are the real ones, on tensors of the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from deployments.engine import lane
from deployments.engine.attention import Scoring
from deployments.engine.attention_flashinfer import FlashInferAttention, Limits
from deployments.engine.attention_staging import StagingPool
from deployments.engine.cuda_pipeline import CudaPipeline
from deployments.engine.flashinfer_fit import Room
from deployments.engine.sampler import Sampler

HIDDEN, HEADS, HEAD_DIM = 64, 1, 64
_CPU = torch.device("cpu")


class Stream:
    """Whatever is current."""

    def __init__(self, device: object = None) -> None:
        del device

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


class Event:
    """Has passed."""

    def __init__(self, *, enable_timing: bool = False) -> None:
        del enable_timing

    def record(self, stream: object = None) -> None:
        """It passes at once."""

    def wait(self, stream: object = None) -> None:
        """Nothing waits."""

    def synchronize(self) -> None:
        """Not even the host."""

    def query(self) -> bool:
        """Whether it has passed."""
        return True

    def elapsed_time(self, _: object) -> float:
        """Milliseconds, the same for all."""
        return 1.0


class Kernels:
    """Of attention; every step is one of decodes that needs no plan."""

    model = "none"

    def room(self, *_: object, **__: object) -> Room:
        return Room(floats=16, ints=16)

    def compile(self, *_: object) -> None:
        pass

    def takes_decodes(self, *_: object) -> bool:
        return True

    def plan(self, *_: object) -> Any:
        return SimpleNamespace(info=())

    def run(self, *_: object) -> None:
        pass

    append = attend_decodes = run


class Stage:
    """One layer of attention by kernels that do nothing."""

    dtype, hidden_size = torch.float32, HIDDEN

    def __init__(self, index: int, of: int, attention: FlashInferAttention, *, scratch: int, vocab: int) -> None:
        self.device, self.attention = _CPU, attention
        self.is_first, self.is_last = index == 0, index == of - 1
        self.kv = (SimpleNamespace(scratch=scratch, bytes=0),)
        self.layer_modules: list[Any] = []
        self.surroundings: list[Any] = []
        self._vocab = vocab

    def hidden(self, source: Tensor, positions: Tensor) -> Tensor:
        """[1, rows, hidden] of zeros."""
        del source
        rows = torch.zeros(1, HEADS, positions.shape[1], HEAD_DIM)
        self.attention.attend(rows, rows, rows, *[torch.zeros(1, 1, HEADS, HEAD_DIM)] * 2, Scoring(1.0, None, None))
        return torch.zeros(1, positions.shape[1], HIDDEN)

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, vocab] of zeros."""
        return torch.zeros(1).expand(hidden.shape[1], self._vocab)


class _NotCompiled(FlashInferAttention):
    compilable = False


@contextmanager
def no_cuda() -> Iterator[None]:
    """Within, CUDA's calls of a pipeline do nothing, and pinned memory is memory."""
    stand_ins: dict[str, Any] = {
        "synchronize": _nothing,
        "graph_pool_handle": _nothing,
        "Stream": Stream,
        "Event": Event,
        "device": Stream,
        "default_stream": Stream,
        "current_stream": Stream,
    }
    with (
        patch.multiple(torch.cuda, **stand_ins),
        patch.multiple(torch, empty=partial(_unpinned, torch.empty), tensor=partial(_unpinned, torch.tensor)),
        patch.object(lane, "capture", lambda *_, **__: SimpleNamespace(replay=lambda: None)),
    ):
        yield


def _nothing(*_: object) -> None:
    pass


def _unpinned(made: Callable[..., Tensor], *values: Any, pin_memory: bool = False, **options: Any) -> Tensor:
    del pin_memory
    return made(*values, **options)


def open_pipeline(
    slots: int, *, max_sequences: int, max_batch_tokens: int, blocks: int, block_size: int, vocab: int, max_context: int
) -> CudaPipeline:
    """A pipeline of so many stages, and as many slots; within `no_cuda`, where its steps are launched too."""
    limits = Limits(max_sequences, max_batch_tokens, max_context // block_size)
    kernels: Any = Kernels()
    pool = StagingPool(limits.table_size, pinned=False)
    backends = [_NotCompiled(block_size, blocks, limits, _CPU, kernels, pool) for _ in range(slots)]
    stages: Any = tuple(Stage(i, slots, backend, scratch=blocks, vocab=vocab) for i, backend in enumerate(backends))
    return CudaPipeline(
        stages,
        Sampler(_CPU, vocab_size=vocab, num_blocks=blocks, block_size=block_size),
        block_size=block_size,
        max_batch_tokens=max_batch_tokens,
        max_sequences=max_sequences,
        max_context=max_context,
    )
