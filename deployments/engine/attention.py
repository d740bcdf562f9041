"""Paged attention: where transformers' attention hook meets the KV blocks.

A model loaded with `attn_implementation=IMPLEMENTATION` calls `paged_attention` once per layer. The hook hands the
layer's queries, keys and values to one custom operator, which writes the step's keys and values into the layer's blocks
and attends over them. The operator takes tensors and numbers alone, so a compiled layer serves all layers of its kind;
who sees whom it learns from the backend that the stage has prepared for the step.

No masks are built by transformers for an implementation whose name is not registered as a mask function.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import chain, takewhile
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

IMPLEMENTATION = "headroom_paged"


class UnsupportedAttention(Exception):
    """The model asks of attention what no backend computes; serving it would be silently wrong."""


class RowSpan(NamedTuple):
    """One sequence's rows in a step, as plain integers: `count` tokens from position `start`."""

    start: int
    count: int  # type: ignore[assignment]  # nobody counts in a span, as one could in any tuple
    block_table: tuple[int, ...]
    """Covers `start + count` tokens at least."""
    encoded: int = 0
    """Of an encoder-decoder: how many of the first positions are the encoder's; the decoder's come behind them."""


@dataclass(frozen=True)
class StepLayout:
    """The rows of one step. Made once per step; the backend of every stage prepares itself for it."""

    spans: tuple[RowSpan, ...]
    """One per sequence, in row order."""
    block_size: int
    padding: int = 0
    """Rows behind those of the spans, up to the size of a captured graph. Nobody reads what comes of them."""
    sequences: int | None = None
    """Sequences of a captured graph whose rows are no decodes alone: the step's, one that has the padding, and others
    without rows, one at least. None: as many as there are."""
    decodes: int | None = None
    """The first of those sequences, for decodes, and one at least without rows. None: there are none apart."""
    shared: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)
    """What the first stage's backend computes and the others take over."""

    @property
    def ahead(self) -> int:
        """Sequences of one row that come before others, at most as many as a graph has room for."""
        count = singles(self.spans)
        if self.sequences is None:
            return count if count < len(self.spans) else 0
        return min(count, max(0, (self.decodes or 0) - 1))

    def padded(self, scratch: int) -> tuple[RowSpan, ...]:
        """The spans, and what pads them: a first token in the scratch block for each row, or one sequence of all."""
        if self.sequences is None:
            return self.spans + (RowSpan(0, 1, _all_scratch(scratch, 1)),) * self.padding
        ahead, empty = self.ahead, (RowSpan(0, 0, ()),)
        spans = self.spans[:ahead] + empty * ((self.decodes or 0) - ahead) + self.spans[ahead:]
        blocks = -(-self.padding // self.block_size)
        rest = (RowSpan(0, self.padding, _all_scratch(scratch, blocks)),) if self.padding else ()
        return spans + rest + empty * (self.sequences - len(spans) - len(rest))


@lru_cache(maxsize=1024)
def _all_scratch(scratch: int, blocks: int) -> tuple[int, ...]:
    """A block table of padding; the same object each time, as a sequence's own stays the same."""
    return (scratch,) * blocks


def positions_of(spans: Iterable[RowSpan]) -> tuple[int, ...]:
    """Of each row, sequence by sequence."""
    return tuple(chain.from_iterable(range(span.start, span.start + span.count) for span in spans))


def singles(spans: Iterable[RowSpan]) -> int:
    """How many sequences of one row come before all others."""
    return sum(1 for _ in takewhile(lambda span: span.count == 1, spans))


@dataclass(frozen=True)
class Scoring:
    """How scores become weights: `softmax(mask(softcap * tanh(scale * q k / softcap)))`."""

    scale: float
    window: int | None
    """Keys a row sees at most, its own included; None: all up to its own."""
    softcap: float | None


class PagedKv:
    """KV blocks of one layer: keys and values, each [blocks + 1 scratch, block_size, kv_heads, head_dim].

    `head_dim` may be more than the model's, whose heads then have zeros behind them: see `zero_padded`.
    In float8_e4m3fn they are stored at scale 1; what lies outside its range saturates. A latent (MLA) is one vector
    that stands for both: it is in the keys, and the values are of size 0.
    """

    def __init__(
        self,
        blocks: int,
        block_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        latent: bool = False,
    ) -> None:
        shape = (blocks + 1, block_size, kv_heads, head_dim)
        # Two storages: of views of one, torch.compile would not write to either in place but copy the whole cache.
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros((*shape[:3], 0) if latent else shape, dtype=dtype, device=device)
        self.head_dim = head_dim
        self.scratch = blocks
        """Block id of padding; no sequence owns it."""

    @cached_property
    def bytes(self) -> int:
        """Bytes of both tensors, the scratch block included."""
        return self.keys.nbytes + self.values.nbytes


class Attention(ABC):
    """Runs a stage's layers for a step, so that they attend over the KV blocks of one device."""

    name: ClassVar[str]
    capturable: ClassVar[bool]
    """Whether a run may be captured in a CUDA graph, and replayed after another `prepare` of as many rows."""
    compilable: ClassVar[bool] = True
    """Whether torch.compile may have the layers."""
    fixed_rows: ClassVar[int | None] = None
    """Layers and head always run on so many rows, whatever the step; None: on the step's."""

    def __init__(self) -> None:
        self.calls: Counter[int] = Counter()
        """Calls by the address of the layer's keys; replays of a graph are not among them."""
        self.runs = 0
        """Forwards; each calls every layer's attention once."""

    @abstractmethod
    def prepare(self, layout: StepLayout) -> None:
        """Make ready for a step: work on the host and uploads on the device's default stream, which must be the current
        one; never captured."""

    @abstractmethod
    def run(
        self, forward: Callable[..., Tensor], source: Tensor, positions: Tensor, kv: Mapping[int, PagedKv]
    ) -> Tensor:
        """Run the layers on all rows of the step that was prepared.

        Args:
            forward: (ids [B, n] or hidden states [B, n, hidden], positions int64 [B, n], and by name what else the
                model's decoder takes) -> [B, n, hidden].
            source: [1, T] or [1, T, hidden], as the stage has it.
            positions: int64 [1, T].
            kv: the stage's blocks by the layer's index in the model.

        Returns:
            [1, T, hidden].
        """


class AttentionBackend(Attention):
    """Computes attention over the blocks themselves, for models that call transformers' attention function."""

    def run(
        self, forward: Callable[..., Tensor], source: Tensor, positions: Tensor, kv: Mapping[int, PagedKv]
    ) -> Tensor:
        """One forward over all rows; the layers find their blocks by `attach_kv`."""
        del kv
        self.runs += 1
        with self.step():
            return forward(source, positions, use_cache=False)

    @abstractmethod
    def attend(self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, how: Scoring) -> Tensor:
        """Write the step's rows into the layer's blocks, and attend over them.

        Args:
            query: [1, heads, T, head_dim], all rows of the step, in the compute dtype.
            key: [1, kv_heads, T, head_dim] in the blocks' dtype, like `value`.
            keys: the layer's blocks, [blocks + 1, block_size, kv_heads, head_dim], like `values`.

        Returns:
            [1, T, heads, head_dim] in the compute dtype.
        """

    @contextmanager
    def step(self) -> Iterator[None]:
        """Attention that this thread calls inside goes to this backend."""
        before, _active.backend = _active.backend, self
        try:
            yield
        finally:
            _active.backend = before


class _Active(threading.local):
    """The backend of the forward that a thread runs. Stages on the CPU have a thread each."""

    backend: AttentionBackend | None = None


_active = _Active()


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    **extra: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function over paged blocks.

    Args:
        query: [1, heads, T, head_dim], all rows of the step; key and value: [1, kv_heads, T, head_dim].

    Returns:
        [1, T, heads, head_dim], and no weights.

    Raises:
        UnsupportedAttention: for dropout, a prebuilt mask, attention sinks or biases.
    """
    unknown = [name for name in ("s_aux", "position_bias", "alibi", "head_mask") if extra.get(name) is not None]
    if attention_mask is not None or dropout or unknown:
        reason = ", ".join(unknown) or ("a prebuilt mask" if attention_mask is not None else "dropout")
        raise UnsupportedAttention(f"{type(module).__name__} passes {reason}, which paged attention does not compute")
    kv: PagedKv = module.headroom_kv  # type: ignore[assignment]  # as `attach_kv` left it
    size, scale = value.shape[-1], query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key, value = (zero_padded(rows, kv.head_dim) for rows in (query, key, value))
    key, value = stored(key, kv.keys.dtype), stored(value, kv.values.dtype)
    out: Tensor = torch.ops.headroom.paged_attention(
        query, key, value, kv.keys, kv.values, scale, sliding_window, softcap
    )
    return out[..., :size].contiguous(), None


def zero_padded(rows: Tensor, head_dim: int) -> Tensor:
    """`rows` [..., size] with zeros behind, up to the head size of the blocks. They change no score, and what comes of
    them is zeros. Not in the operator, like `stored`."""
    missing = head_dim - rows.shape[-1]
    return nn.functional.pad(rows, (0, missing)) if missing > 0 else rows


def stored(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """`rows` as the blocks keep them. Not in the operator, so that a compiled layer fuses it with what comes before."""
    if dtype == torch.float8_e4m3fn:  # saturate, whatever the device's conversion does with what lies outside
        limit = torch.finfo(dtype).max
        rows = rows.clamp(-limit, limit)
    return rows.to(dtype)


def indexable(tensor: Tensor) -> Tensor:
    """float8 as bytes: PyTorch's indexing does not know it everywhere."""
    return tensor.view(torch.uint8) if tensor.itemsize == 1 else tensor


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    backend = _active.backend
    if backend is None:
        raise RuntimeError("paged attention was called outside a step")
    backend.calls[keys.data_ptr()] += 1
    return backend.attend(query, key, value, keys, values, Scoring(scale, window, softcap))


def _attend_shapes(query: Tensor, *_: Any) -> Tensor:
    one, heads, rows, head_dim = query.shape
    return query.new_empty(one, rows, heads, head_dim)


# Defined by its schema: torch.library.custom_op would add 20 us to each call, for autograd that nothing here needs.
_library = torch.library.Library("headroom", "FRAGMENT")
_library.define(
    "paged_attention(Tensor query, Tensor key, Tensor value, Tensor(a!) keys, Tensor(b!) values, "
    "float scale, int? window, float? softcap) -> Tensor"
)
_library.impl("paged_attention", _attend, "CompositeExplicitAutograd")
torch.library.register_fake("headroom::paged_attention", _attend_shapes, lib=_library)

AttentionInterface.register(IMPLEMENTATION, paged_attention)
