"""Batch-invariant steps: a row's bits depend on its sequence alone, not on what else is in the step.

Kernels and libraries choose how they sum by the number of rows, so everything runs on `ROWS` rows, always: a step is
cut in passes, the last padded, and the head works on as many. Attention, whose sums run over a sequence, is computed
for `ROWS` aligned positions of one sequence at a time against all keys up to the last of them: a product's shape
follows from the row's position, whether it is decoded alone or is part of a prompt's chunk, whatever the chunk. Keys
that a row does not see have a weight of exactly 0. Experts compute whole passes (`deployments.engine.experts`).

It costs what the weights cost to be read once more for every `ROWS` rows, and on GPUs the CUDA graphs and FlashInfer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deployments.engine.attention import AttentionBackend, PagedKv, RowSpan, Scoring, StepLayout, indexable
from deployments.engine.experts import INVARIANT
from deployments.errors import ConfigError

ROWS = 16
"""Of a pass: what one launch of the kernels for small batches computes."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive rows of a pass that belong to one sequence and one run of `ROWS` aligned positions."""

    first: int
    """Row of the pass."""
    count: int
    start: int
    """Position of its first row."""
    table: tuple[int, ...]
    """Blocks that hold its sequence up to its last row."""

    @property
    def place(self) -> int:
        """Of its first row among the `ROWS` positions."""
        return self.start % ROWS

    @property
    def keys(self) -> int:
        """Positions up to the last of the run."""
        return self.start - self.place + ROWS


def passes(spans: Sequence[RowSpan], rows: int) -> tuple[tuple[Piece, ...], ...]:
    """The pieces of each pass of a step whose `rows` rows are those of `spans`, and padding behind them."""
    found: list[list[Piece]] = [[] for _ in range(0, rows, ROWS)]
    row = 0
    for span in spans:
        position, end = span.start, span.start + span.count
        while position < end:
            count = min(end - position, ROWS - position % ROWS, ROWS - row % ROWS)
            found[row // ROWS].append(Piece(row % ROWS, count, position, span.block_table))
            position, row = position + count, row + count
    return tuple(map(tuple, found))


class LaidOut:
    """A pass as tensors, made once for all layers.

    Args:
        pieces: of the pass.
        block_size: tokens per KV block.
        scratch: the block id that pads tables.
    """

    def __init__(self, pieces: tuple[Piece, ...], block_size: int, scratch: int, device: torch.device) -> None:
        rows = [piece.first + i for piece in pieces for i in range(piece.count)]
        slots = [
            piece.table[position // block_size] * block_size + position % block_size
            for piece in pieces
            for position in range(piece.start, piece.start + piece.count)
        ]
        self.pieces = pieces
        self.rows = torch.tensor(rows, dtype=torch.int64, device=device)
        """Those of the pieces, and by `slots` where their keys and values go."""
        self.slots = torch.tensor(slots, dtype=torch.int64, device=device)
        self.tables = tuple(torch.tensor(_table(each, block_size, scratch), device=device) for each in pieces)
        """int64 [blocks] per piece, covering its keys."""
        self._device = device
        self._unseen: dict[tuple[int, int | None, int], Tensor] = {}

    def unseen(self, piece: Piece, window: int | None, shared: int) -> Tensor:
        """bool [shared * ROWS, keys]: what the rows do not see, for all query heads of one KV head."""
        key = (piece.keys, window, shared)
        if key not in self._unseen:
            position = torch.arange(piece.keys - ROWS, piece.keys, device=self._device)[:, None]
            other = torch.arange(piece.keys, device=self._device)
            hidden = other > position
            if window is not None:
                hidden |= other <= position - window
            self._unseen[key] = hidden.repeat(shared, 1)
        return self._unseen[key]


def _table(piece: Piece, block_size: int, scratch: int) -> list[int]:
    need = -(-piece.keys // block_size)
    return [*piece.table[:need], *[scratch] * (need - len(piece.table))]


class InvariantAttention(AttentionBackend):
    """Paged attention whose rows don't depend on each other, in PyTorch's own operators.

    Args:
        num_blocks: blocks of sequences, and so the id of the scratch block behind them.
        device: where the blocks are.
    """

    name: ClassVar[str] = "torch, batch-invariant"
    capturable: ClassVar[bool] = False
    fixed_rows: ClassVar[int | None] = ROWS

    def __init__(self, num_blocks: int, device: torch.device) -> None:
        super().__init__()
        self._scratch = num_blocks
        self._device = device
        self._block_size = 1
        self._spans: tuple[RowSpan, ...] = ()
        self._pass: LaidOut | None = None
        """The one that runs."""

    def prepare(self, layout: StepLayout) -> None:
        """See `Attention.prepare`. Rows that pad a step pad its passes too: they belong to no piece."""
        self._block_size, self._spans = layout.block_size, layout.spans

    def run(
        self, forward: Callable[..., Tensor], source: Tensor, positions: Tensor, kv: Mapping[int, PagedKv]
    ) -> Tensor:
        """One forward of `ROWS` rows for each pass; see `Attention.run`."""
        del kv
        rows, out = positions.shape[1], []
        parts = zip(passes(self._spans, rows), in_runs(source, ROWS), in_runs(positions, ROWS), strict=True)
        for pieces, part, places in parts:
            self._pass = LaidOut(pieces, self._block_size, self._scratch, self._device)
            self.runs += 1
            with self.step():
                out.append(forward(part, places, use_cache=False))
        return torch.cat(out, dim=1)[:, :rows]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, how: Scoring) -> Tensor:
        """See `AttentionBackend.attend`."""
        if (laid := self._pass) is None:
            raise RuntimeError("paged attention was called before its step was prepared")
        for blocks, rows in ((keys, key), (values, value)):
            written = indexable(rows[0].transpose(0, 1)).index_select(0, laid.rows)
            indexable(blocks).flatten(0, 1).index_copy_(0, laid.slots, written)
        out = query.new_zeros(query.shape[2], query.shape[1], query.shape[3])
        for piece, table in zip(laid.pieces, laid.tables, strict=True):
            span = slice(piece.first, piece.first + piece.count)
            seen, said = (_gather(blocks, piece, table, query.dtype) for blocks in (keys, values))
            unseen = laid.unseen(piece, how.window, query.shape[1] // seen.shape[0])
            out[span] = _attend(piece, query[0, :, span], seen, said, unseen, how)
        return out[None]


def _attend(piece: Piece, query: Tensor, keys: Tensor, values: Tensor, unseen: Tensor, how: Scoring) -> Tensor:
    """[heads, count, head_dim] x [kv_heads, keys, head_dim] -> [count, heads, head_dim], in float32; all shapes inside
    follow from the piece's run alone."""
    heads, count, head_dim = query.shape
    whole = query.new_zeros(heads, ROWS, head_dim)
    whole[:, piece.place : piece.place + count] = query
    grouped = whole.reshape(keys.shape[0], -1, head_dim)
    scores = torch.matmul(grouped.float(), keys.float().transpose(-1, -2)) * how.scale
    if how.softcap is not None:
        scores = torch.tanh(scores / how.softcap) * how.softcap
    weights = scores.masked_fill(unseen, float("-inf")).softmax(-1)
    out = torch.matmul(weights, values.float()).to(query.dtype).reshape(heads, ROWS, -1)
    return out[:, piece.place : piece.place + count].transpose(0, 1)


def _gather(blocks: Tensor, piece: Piece, table: Tensor, dtype: torch.dtype) -> Tensor:
    """[kv_heads, keys, head_dim]; zeros behind the piece, where others may have left what is not a number."""
    found = indexable(blocks).index_select(0, table).view(blocks.dtype).to(dtype).flatten(0, 1)[: piece.keys]
    found[piece.start + piece.count :] = 0
    return found.transpose(0, 1)


def in_runs(rows: Tensor, size: int) -> Iterator[Tensor]:
    """[1, T, ...] in parts of exactly `size`, one at least, the last padded with zeros."""
    for first in range(0, max(1, rows.shape[1]), size):
        part = rows[:, first : first + size]
        if (missing := size - part.shape[1]) > 0:
            part = torch.cat((part, part.new_zeros(1, missing, *part.shape[2:])), dim=1)
        yield part


def keep_rows_apart(model: PreTrainedModel) -> None:
    """Let each expert compute all rows of a pass, instead of those that visit it.

    Raises:
        ConfigError: a layer mixes the rows of a step: its experts are not under transformers' experts interface.
    """
    model.set_experts_implementation(INVARIANT)
    for name, module in model.named_modules():
        if name.split(".")[-1] == "experts" and not _computes_whole_passes(module):
            raise ConfigError(
                f"batch_invariant does not serve {type(model).__name__}: {name} computes as many rows at once as visit "
                "an expert, and transformers' experts interface does not reach it; leave it out, or choose a model of "
                "another architecture"
            )


def _computes_whole_passes(experts: nn.Module) -> bool:
    under_interface = hasattr(experts, "has_gate")  # left there by transformers
    return under_interface and getattr(experts.config, "_experts_implementation", None) == INVARIANT
