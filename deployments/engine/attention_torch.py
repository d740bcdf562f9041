"""The torch backend: PyTorch's SDPA over gathered blocks. For the CPU, and wherever FlashInfer does not fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from deployments.engine.attention import AttentionBackend, RowSpan, Scoring, StepLayout, indexable


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


class TorchAttention(AttentionBackend):
    """Paged attention in PyTorch's own operators.

    Args:
        num_blocks: blocks of sequences, and so the id of the scratch block behind them.
        device: where the blocks are.
    """

    name = "torch"
    capturable = False

    def __init__(self, num_blocks: int, device: torch.device) -> None:
        super().__init__()
        self.geometry: Geometry | None = None
        self._scratch = num_blocks
        self._device = device

    def prepare(self, layout: StepLayout) -> None:
        """Lay the step out as tensors."""
        spans = layout.padded(self._scratch)
        self.geometry = build_geometry(spans, layout.block_size, self._scratch, self._device)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, how: Scoring) -> Tensor:
        """See `AttentionBackend.attend`."""
        if self.geometry is None:
            raise RuntimeError("paged attention was called before its step was prepared")
        _write(keys, key, self.geometry)
        _write(values, value, self.geometry)
        kv = _Gathered(keys, values, query.dtype)
        return _attend(kv, self.geometry, query[0], key.to(query.dtype), value.to(query.dtype), how)


def build_geometry(spans: Sequence[RowSpan], block_size: int, scratch: int, device: torch.device) -> Geometry:
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


def _write(blocks: Tensor, rows: Tensor, geometry: Geometry) -> None:
    """Store the step's [1, kv_heads, T, head_dim] rows, and clear what stays unwritten of new blocks."""
    flat, rows = indexable(blocks).flatten(0, 1), indexable(rows[0].transpose(0, 1))
    flat.index_copy_(0, geometry.slots, rows)
    if geometry.unwritten is not None:
        flat.index_fill_(0, geometry.unwritten, 0)


@dataclass(frozen=True)
class _Gathered:
    """A layer's blocks, gathered by table."""

    keys: Tensor
    values: Tensor
    dtype: torch.dtype
    """Compute dtype."""

    def gather(self, tables: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Keys and values of `rows` equally long tables, each [rows, kv_heads, tokens, head_dim]."""
        return self._gather(self.keys, tables, rows), self._gather(self.values, tables, rows)

    def _gather(self, blocks: Tensor, tables: Tensor, rows: int) -> Tensor:
        found = indexable(blocks).index_select(0, tables).view(blocks.dtype).to(self.dtype)
        return found.view(rows, -1, *blocks.shape[2:]).transpose(1, 2)


def _attend(kv: _Gathered, geometry: Geometry, query: Tensor, key: Tensor, value: Tensor, how: Scoring) -> Tensor:
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


def _decode(kv: _Gathered, group: DecodeGroup, query: Tensor, how: Scoring, block_size: int) -> Tensor:
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
