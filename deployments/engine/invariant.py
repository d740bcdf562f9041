"""Batch-invariant steps: a row's bits depend on its sequence alone, not on what else is in the step.

Kernels and libraries choose how they sum by the number of rows, so everything runs on `ROWS` rows, always: a step is
cut in passes, the last padded, and the head works on as many. Attention, whose sums run over a sequence, is computed
for `ROWS` aligned positions of one sequence at a time against all keys up to the last of them: a product's shape
follows from the row's position, whether it is decoded alone or is part of a prompt's chunk, whatever the chunk. Keys
that a row does not see have a weight of exactly 0.

It costs what the weights cost to be read once more for every `ROWS` rows, and on GPUs the CUDA graphs and FlashInfer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from deployments.engine.attention import AttentionBackend, PagedKv, RowSpan, Scoring, StepLayout, indexable
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
        self._block_size = 0
        self._spans: tuple[RowSpan, ...] = ()
        self._pieces: tuple[Piece, ...] = ()
        """Of the pass that runs."""

    def prepare(self, layout: StepLayout) -> None:
        """See `Attention.prepare`. Rows that pad a step pad its passes too: they belong to no piece."""
        self._block_size, self._spans = layout.block_size, layout.spans

    def run(
        self, forward: Callable[..., Tensor], source: Tensor, positions: Tensor, kv: Mapping[int, PagedKv]
    ) -> Tensor:
        """One forward of `ROWS` rows for each pass; see `Attention.run`."""
        del kv
        rows = positions.shape[1]
        out = []
        for pieces, part, place in zip(
            passes(self._spans, rows), in_runs(source, ROWS), in_runs(positions, ROWS), strict=True
        ):
            self._pieces = pieces
            self.runs += 1
            with self.step():
                out.append(forward(part, place, use_cache=False))
        return torch.cat(out, dim=1)[:, :rows]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, how: Scoring) -> Tensor:
        """See `AttentionBackend.attend`."""
        self._write(keys, key)
        self._write(values, value)
        out = query.new_zeros(query.shape[2], query.shape[1], query.shape[3])
        for piece in self._pieces:
            rows = slice(piece.first, piece.first + piece.count)
            out[rows] = self._attend(piece, query[0, :, rows], keys, values, how)
        return out[None]

    def _write(self, blocks: Tensor, rows: Tensor) -> None:
        """Store the pieces' rows of [1, kv_heads, T, head_dim]."""
        size = self._block_size
        which = [piece.first + i for piece in self._pieces for i in range(piece.count)]
        if not which:
            return
        slots = [
            piece.table[p // size] * size + p % size
            for piece in self._pieces
            for p in range(piece.start, piece.start + piece.count)
        ]
        taken = indexable(rows[0].transpose(0, 1))[torch.tensor(which, device=self._device)]
        indexable(blocks).flatten(0, 1).index_copy_(0, torch.tensor(slots, device=self._device), taken)

    def _attend(self, piece: Piece, query: Tensor, keys: Tensor, values: Tensor, how: Scoring) -> Tensor:
        """[heads, count, head_dim] -> [count, heads, head_dim]; shapes by the piece's run alone."""
        heads, count, head_dim = query.shape
        whole = query.new_zeros(heads, ROWS, head_dim)
        whole[:, piece.place : piece.place + count] = query
        seen, said = self._gather(keys, piece, query.dtype), self._gather(values, piece, query.dtype)
        grouped = whole.reshape(seen.shape[0], -1, head_dim)
        scores = torch.matmul(grouped.float(), seen.float().transpose(-1, -2)) * how.scale
        if how.softcap is not None:
            scores = torch.tanh(scores / how.softcap) * how.softcap
        scores = scores.masked_fill(~self._visible(piece, how.window, heads // seen.shape[0]), float("-inf"))
        out = torch.matmul(scores.softmax(-1), said.float()).to(query.dtype)
        return out.reshape(heads, ROWS, -1)[:, piece.place : piece.place + count].transpose(0, 1)

    def _gather(self, blocks: Tensor, piece: Piece, dtype: torch.dtype) -> Tensor:
        """[kv_heads, keys, head_dim]; zeros behind the piece, where others may have left what is not a number."""
        need = -(-piece.keys // self._block_size)
        table = [*piece.table[:need], *[self._scratch] * (need - len(piece.table))]
        found = indexable(blocks).index_select(0, torch.tensor(table, device=self._device)).view(blocks.dtype).to(dtype)
        rows = found.flatten(0, 1)[: piece.keys]
        rows[piece.start + piece.count :] = 0
        return rows.transpose(0, 1)

    def _visible(self, piece: Piece, window: int | None, shared: int) -> Tensor:
        """bool [shared * ROWS, keys]: the rows of all query heads of one KV head."""
        position = torch.arange(piece.keys - ROWS, piece.keys, device=self._device)[:, None]
        key = torch.arange(piece.keys, device=self._device)
        visible = key <= position
        if window is not None:
            visible &= key > position - window
        return visible.repeat(shared, 1)


def in_runs(rows: Tensor, size: int) -> Iterator[Tensor]:
    """[1, T, ...] in parts of exactly `size`, one at least, the last padded with zeros."""
    for first in range(0, max(1, rows.shape[1]), size):
        part = rows[:, first : first + size]
        if (missing := size - part.shape[1]) > 0:
            part = torch.cat((part, part.new_zeros(1, missing, *part.shape[2:])), dim=1)
        yield part


def check_rows_are_apart(model: nn.Module) -> None:
    """Refuse a model whose layers mix the rows of a step.

    Raises:
        ConfigError: a mixture of experts: each computes the rows that visit it, however many those are.
    """
    experts = next((name for name, _ in model.named_modules() if name.split(".")[-1] == "experts"), None)
    if experts is not None:
        raise ConfigError(
            f"batch_invariant does not serve {type(model).__name__}: {experts} computes as many rows at once as visit "
            "an expert; leave it out, or serve a dense model"
        )
