"""Paged attention: where transformers' attention hook meets the KV blocks.

A model loaded with `attn_implementation=IMPLEMENTATION` calls `paged_attention` once per layer. It writes the step's
keys and values into the layer's blocks and attends over them. No masks are built by transformers for an
implementation whose name is not registered as a mask function; the geometry of the step says who sees what.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

IMPLEMENTATION = "headroom_paged"


class UnsupportedAttention(Exception):
    """The model asks of attention what this backend does not compute; serving it would be silently wrong."""


@dataclass(frozen=True)
class DecodeGroup:
    """Single-token rows whose block tables are padded to one width.

    Rows are grouped by the power of two above their block count, so one long sequence does not make its
    batch-mates gather as much as it does.
    """

    rows: Tensor | None
    """int64 [B]: rows of the step; None when they are all rows of the step, in order."""
    tables: Tensor
    """int64 [B * width]: block ids, padded with the scratch block."""
    width: int
    """Blocks per row."""
    lengths: Tensor
    """int64 [B]: tokens of each sequence, the one being computed included."""
    masks: dict[int | None, Tensor] = field(default_factory=dict)
    """bool [B, 1, 1, width * block_size] by sliding window, made once per step."""

    def mask(self, block_size: int, window: int | None) -> Tensor:
        if window not in self.masks:
            position = torch.arange(self.width * block_size, device=self.lengths.device)
            visible = position < self.lengths[:, None]
            if window is not None:
                visible &= position >= self.lengths[:, None] - window
            self.masks[window] = visible[:, None, None, :]
        return self.masks[window]


@dataclass(frozen=True)
class PrefillChunk:
    """Consecutive tokens of one prompt: rows [first, first + count) at positions [start, start + count)."""

    first: int
    count: int
    start: int
    table: Tensor
    """int64 [blocks] covering `start + count` tokens; unused while `start` is 0."""
    masks: dict[int | None, Tensor] = field(default_factory=dict)

    def mask(self, keys: int, window: int | None) -> Tensor:
        """bool [count, keys]: row i sees keys up to its own position, and at most `window` of them."""
        if window not in self.masks:
            device = self.table.device
            query = torch.arange(self.start, self.start + self.count, device=device)[:, None]
            key = torch.arange(keys, device=device)[None, :]
            visible = key <= query
            if window is not None:
                visible &= key > query - window
            self.masks[window] = visible
        return self.masks[window]


@dataclass(frozen=True)
class Geometry:
    """Who writes where and who sees whom in one step, on one device; shared by all layers of the stage."""

    slots: Tensor
    """int64 [T]: block * block_size + offset that each row's key and value are written to."""
    unwritten: Tensor | None
    """int64: slots behind the last token in blocks that this step is the first to write; None when there are none.
    They are gathered with a weight of 0, and 0 times a NaN that another request left there would be NaN."""
    decodes: tuple[DecodeGroup, ...]
    chunks: tuple[PrefillChunk, ...]
    block_size: int


@dataclass(frozen=True)
class RowSpan:
    """One sequence's rows in a step, as plain integers: `count` tokens from position `start`."""

    start: int
    count: int
    block_table: tuple[int, ...]


def build_geometry(spans: list[RowSpan], block_size: int, scratch: int, device: torch.device) -> Geometry:
    """Lay the spans out as rows, in order.

    Args:
        scratch: the block id that pads tables: the first past the blocks of sequences, so it is their number as well.
    """
    slots: list[int] = []
    unwritten: list[int] = []
    decodes: dict[int, list[tuple[int, RowSpan]]] = {}
    chunks: list[PrefillChunk] = []
    for span in spans:
        first = len(slots)
        end = span.start + span.count
        slots += [span.block_table[p // block_size] * block_size + p % block_size for p in range(span.start, end)]
        blocks = -(-end // block_size)
        if (blocks - 1) * block_size >= span.start:
            unwritten += range(slots[-1] + 1, (span.block_table[blocks - 1] + 1) * block_size)
        if span.count == 1:
            decodes.setdefault((blocks - 1).bit_length(), []).append((first, span))
        else:
            table = torch.tensor(span.block_table[:blocks], device=device)
            chunks.append(PrefillChunk(first, span.count, span.start, table))
    batches = [batch for members in decodes.values() for batch in _bounded(members, block_size, limit=scratch)]
    every_row = not chunks and len(batches) == 1
    return Geometry(
        torch.tensor(slots, device=device),
        torch.tensor(unwritten, device=device) if unwritten else None,
        tuple(_decode_group(batch, block_size, scratch, every_row, device) for batch in batches),
        tuple(chunks),
        block_size,
    )


def _bounded(members: list[tuple[int, RowSpan]], block_size: int, *, limit: int) -> Iterator[list[tuple[int, RowSpan]]]:
    """Cut a group so that it gathers at most `limit` blocks: sequences that share a prefix could gather more than the
    cache holds, and the plan keeps room for no more than that."""
    widest = max(-(-(span.start + 1) // block_size) for _, span in members)
    rows = max(1, limit // widest)
    for i in range(0, len(members), rows):
        yield members[i : i + rows]


def _decode_group(
    members: list[tuple[int, RowSpan]], block_size: int, scratch: int, every_row: bool, device: torch.device
) -> DecodeGroup:
    used = [-(-(span.start + 1) // block_size) for _, span in members]
    width = max(used)
    tables: list[int] = []
    for (_, span), blocks in zip(members, used, strict=True):
        tables += span.block_table[:blocks]
        tables += [scratch] * (width - blocks)
    rows = None if every_row else torch.tensor([row for row, _ in members], device=device)
    lengths = torch.tensor([span.start + 1 for _, span in members], device=device)
    return DecodeGroup(rows, torch.tensor(tables, device=device), width, lengths)


class PagedKv:
    """KV blocks of one layer: keys and values, each [blocks + 1 scratch, block_size, kv_heads, head_dim]."""

    def __init__(
        self, blocks: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (blocks + 1, block_size, kv_heads, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.scratch = blocks
        """Block id that pads tables; no sequence owns it."""
        self.geometry: Geometry | None = None
        self.calls = 0
        """Attention calls so far; the loader asserts one per layer and forward."""

    @cached_property
    def bytes(self) -> int:
        """Bytes of both tensors, the scratch block included."""
        return self.keys.nbytes + self.values.nbytes

    def write(self, keys: Tensor, values: Tensor, geometry: Geometry) -> None:
        """Store the step's [1, kv_heads, T, head_dim] rows, and clear what stays unwritten of new blocks."""
        for blocks, rows in ((self.keys, keys), (self.values, values)):
            flat = blocks.view(-1, *blocks.shape[2:])
            flat.index_copy_(0, geometry.slots, rows[0].transpose(0, 1))
            if geometry.unwritten is not None:
                flat.index_fill_(0, geometry.unwritten, 0)

    def gather(self, tables: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Keys and values of `rows` equally long tables, each [rows, kv_heads, tokens, head_dim]."""
        shape = (rows, -1, *self.keys.shape[2:])
        keys = self.keys.index_select(0, tables).view(shape).transpose(1, 2)
        values = self.values.index_select(0, tables).view(shape).transpose(1, 2)
        return keys, values


@dataclass(frozen=True)
class Scoring:
    """How scores become weights: `softmax(mask(softcap * tanh(scale * q k / softcap)))`."""

    scale: float
    window: int | None
    softcap: float | None


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
    """transformers' attention function over paged blocks, on PyTorch's SDPA.

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
    kv: PagedKv = module.headroom_kv  # type: ignore[assignment]
    if kv.geometry is None:
        raise RuntimeError("paged attention was called outside a step")
    kv.calls += 1
    kv.write(key, value, kv.geometry)
    scoring = Scoring(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap)
    return _attend(kv, kv.geometry, query[0], key, value, scoring), None


def _attend(kv: PagedKv, geometry: Geometry, query: Tensor, key: Tensor, value: Tensor, how: Scoring) -> Tensor:
    heads, rows, head_dim = query.shape
    only = geometry.decodes[0] if geometry.decodes else None
    if only is not None and only.rows is None:
        return _decode(kv, only, query, how, geometry.block_size)[None]
    out = query.new_empty(rows, heads, head_dim)
    for group in geometry.decodes:
        out[group.rows] = _decode(kv, group, query[:, group.rows], how, geometry.block_size)
    for chunk in geometry.chunks:
        span = slice(chunk.first, chunk.first + chunk.count)
        if chunk.start == 0:
            keys, values = key[:, :, span], value[:, :, span]
        else:
            keys, values = kv.gather(chunk.table, 1)
        out[span] = _prefill(chunk, query[:, span], keys, values, how)
    return out[None]


def _decode(kv: PagedKv, group: DecodeGroup, query: Tensor, how: Scoring, block_size: int) -> Tensor:
    """[heads, B, head_dim] -> [B, heads, head_dim]; the query heads of one KV head share its keys as rows."""
    heads, rows, head_dim = query.shape
    keys, values = kv.gather(group.tables, rows)
    grouped = query.transpose(0, 1).reshape(rows, keys.shape[1], -1, head_dim)
    mask = group.mask(block_size, how.window)
    return _softmax_attention(grouped, keys, values, mask, how).reshape(rows, heads, head_dim)


def _prefill(chunk: PrefillChunk, query: Tensor, keys: Tensor, values: Tensor, how: Scoring) -> Tensor:
    """[heads, n, head_dim] x [1, kv_heads, L, head_dim] -> [n, heads, head_dim]."""
    heads, count, head_dim = query.shape
    if chunk.start == 0 and how.softcap is None and (how.window is None or how.window >= count):
        shared = heads // keys.shape[1]
        keys, values = keys.repeat_interleave(shared, dim=1), values.repeat_interleave(shared, dim=1)
        out = scaled_dot_product_attention(query[None], keys, values, is_causal=True, scale=how.scale)
        return out[0].transpose(0, 1)
    kv_heads = keys.shape[1]
    grouped = query.reshape(1, kv_heads, -1, head_dim)
    mask = chunk.mask(keys.shape[2], how.window).repeat(heads // kv_heads, 1)
    out = _softmax_attention(grouped, keys, values, mask, how)
    return out.reshape(heads, count, head_dim).transpose(0, 1)


def _softmax_attention(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, how: Scoring) -> Tensor:
    if how.softcap is None:
        return scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=how.scale)
    scores = torch.matmul(query, keys.transpose(-1, -2)) * how.scale
    scores = torch.tanh(scores / how.softcap) * how.softcap
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(weights, values)


AttentionInterface.register(IMPLEMENTATION, paged_attention)
