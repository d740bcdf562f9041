"""The gather cache: paged blocks for models whose attention takes a transformers `Cache` but no attention function.

BLOOM, Falcon, MPT, GPT-J and others compute attention in code of their own. Such a model runs a step as one forward for
each batch of sequences with equally many new tokens. In a forward its cache writes the new keys and values into the
sequences' blocks and hands back all of them, gathered and padded on the left, under the masks that transformers makes
for a left-padded batch. That is slower than attention over the blocks themselves, and needs memory for the copies and
for whatever the model's own attention makes of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, zip_longest
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from deployments.engine.attention import (
    Attention,
    PagedKv,
    RowSpan,
    StepLayout,
    UnsupportedAttention,
    indexable,
    stored,
    zero_padded,
)
from placement.gathered import Bound

_WASTE = 2
"""The longest sequence of a batch is at most so many times the shortest: what is gathered is padded to the longest."""


@dataclass(frozen=True)
class Batch:
    """Sequences with equally many new tokens, as one left-padded batch of B rows."""

    rows: Tensor
    """int64 [B * new]: rows of the step, sequence by sequence."""
    new: int
    """New tokens of each sequence."""
    past: int
    """Tokens before the new ones, padding included."""
    written: Tensor
    """int64 [B * new]: block * block_size + offset that the new tokens' keys and values are written to."""
    gathered: Tensor
    """int64 [B * (past + new)]: the same of all tokens; padding reads the sequence's own first token, whose weight of 0
    would else meet what another request left behind."""
    mask: Tensor
    """int64 [B, past + new]: 0 where padded."""


class GatherAttention(Attention):
    """Runs a stage whose model attends in its own code.

    Args:
        num_blocks: blocks of sequences, and so the id of the scratch block behind them.
        device: where the blocks are.
        bound: of a forward, on which the plan counts.
    """

    name = "gather cache"
    capturable = False
    compilable = False

    def __init__(self, num_blocks: int, device: torch.device, bound: Bound) -> None:
        super().__init__()
        self.bound = bound
        self._scratch = num_blocks
        self._device = device
        self._batches: tuple[Batch, ...] = ()

    def prepare(self, layout: StepLayout) -> None:
        """Lay the step out as batches."""
        # Sequences that share a prefix, and padding, could gather more than the blocks hold, and the plan keeps room
        # for no more than that.
        groups = group_spans(layout.padded(self._scratch), self._scratch * layout.block_size, self.bound)
        self._batches = tuple(make_batch(group, layout.block_size, self._device) for group in groups)

    def run(
        self, forward: Callable[..., Tensor], source: Tensor, positions: Tensor, kv: Mapping[int, PagedKv]
    ) -> Tensor:
        """See `Attention.run`."""
        out: Tensor | None = None
        for batch in self._batches:
            layers = [GatherLayer(kv.get(index), batch) for index in range(max(kv) + 1)]
            cache = Cache(layers=[*layers])
            hidden = forward(
                _select(source, batch),
                _select(positions, batch),
                use_cache=True,
                attention_mask=batch.mask,
                past_key_values=cache,
            )
            self._count(layers)
            if out is None:
                out = hidden.new_empty(1, source.shape[1], hidden.shape[-1])
            out[0, batch.rows] = hidden.flatten(0, 1)
        assert out is not None, "a step has rows"
        return out

    def _count(self, layers: Sequence[GatherLayer]) -> None:
        self.runs += 1
        for layer in layers:
            if layer.kv is not None:
                self.calls[layer.kv.keys.data_ptr()] += layer.updates


class GatherLayer(CacheLayerMixin):
    """What one layer's attention reads and writes in one forward.

    Args:
        kv: its blocks; None for a layer of another stage, which is asked for lengths alone.
        batch: the forward's sequences.
    """

    def __init__(self, kv: PagedKv | None, batch: Batch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # transformers'
        self.kv = kv
        self.updates = 0
        self._batch = batch

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the new keys and values, and gather all.

        Args:
            key_states: [B, heads, new, key size], where heads may be KV heads or KV heads repeated for all that share
                them; value_states likewise.

        Returns:
            Both in [B, heads, past + new, size].

        Raises:
            UnsupportedAttention: the layer caches other shapes than the plan counts.
        """
        if self.kv is None:
            raise UnsupportedAttention("a layer updates the cache of a layer on another stage")
        self.updates += 1
        if not self.kv.values.numel():  # a latent: both in one vector
            whole = self._through(self.kv.keys, torch.cat((key_states, value_states), -1))
            return whole[..., : key_states.shape[-1]], whole[..., key_states.shape[-1] :]
        return self._through(self.kv.keys, key_states), self._through(self.kv.values, value_states)

    def _through(self, blocks: Tensor, new: Tensor) -> Tensor:
        """[B, heads, new, size] into the blocks, and [B, heads, past + new, size] out of them."""
        batch, heads, count, size = new.shape
        kv_heads = blocks.shape[2]
        if heads % kv_heads or count != self._batch.new or size > blocks.shape[3]:
            raise UnsupportedAttention(
                f"a layer caches {heads} heads of size {size}, and its config promises {kv_heads} of {blocks.shape[3]}"
            )
        shared = heads // kv_heads
        flat = indexable(blocks).flatten(0, 1)
        rows = stored(zero_padded(new[:, ::shared].transpose(1, 2).flatten(0, 1), blocks.shape[3]), blocks.dtype)
        flat.index_copy_(0, self._batch.written, indexable(rows))
        found = flat.index_select(0, self._batch.gathered).view(blocks.dtype).to(new.dtype)
        whole = found.view(batch, -1, *blocks.shape[2:])[..., :size].transpose(1, 2)
        return whole if shared == 1 else whole.repeat_interleave(shared, dim=1)

    def get_seq_length(self) -> int:
        """Tokens before the forward, padding included, and once it has written also its own."""
        return self._batch.past + (self._batch.new if self.updates else 0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys, index of the first)."""
        return self._batch.past + query_length, 0

    def get_max_length(self) -> int:
        """-1: none."""
        return -1

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The blocks are there already."""


def group_spans(spans: Sequence[RowSpan], tokens: int, bound: Bound) -> Iterator[list[tuple[int, RowSpan]]]:
    """Batches of (first row, span), to be run in this order: spans of equally many rows, of which the longest is at
    most twice as long as the shortest.

    Args:
        tokens: gathered by a batch at most, unless a sequence alone has more.
        bound: of a batch, unless a row alone takes more. Spans that take more are divided, and a part comes in no
            earlier batch than those before it.
    """
    firsts = accumulate((span.count for span in spans), initial=0)
    divided = [list(_divide(first, span, bound)) for first, span in zip(firsts, spans, strict=False)]
    for parts in zip_longest(*divided):
        by_count: dict[int, list[tuple[int, RowSpan]]] = {}
        for part in filter(None, parts):
            by_count.setdefault(part[1].count, []).append(part)
        for count, members in by_count.items():
            yield from _batches(sorted(members, key=lambda each: each[1].start), min(tokens, bound.tokens(count)))


def _divide(first: int, span: RowSpan, bound: Bound) -> Iterator[tuple[int, RowSpan]]:
    """The span's rows in parts that each keep to the bound, one row at least."""
    start, end = span.start, span.start + span.count
    while start < end:
        count = end - start
        while count > 1 and start + count > bound.tokens(count):
            count = -(-count // 2)
        yield first + start - span.start, RowSpan(start, count, span.block_table)
        start += count


def _batches(members: Sequence[tuple[int, RowSpan]], limit: int) -> Iterator[list[tuple[int, RowSpan]]]:
    """Neighbours that together gather so many tokens at most."""
    batch: list[tuple[int, RowSpan]] = []
    for member in members:
        longest = member[1].start + member[1].count
        shortest = batch[0][1].start + batch[0][1].count if batch else longest
        if longest > _WASTE * shortest or (batch and longest * (len(batch) + 1) > limit):
            yield batch
            batch = []
        batch.append(member)
    yield batch


def make_batch(members: Sequence[tuple[int, RowSpan]], block_size: int, device: torch.device) -> Batch:
    """The tensors of spans with equally many rows, given with their first rows."""
    new = members[0][1].count
    past = max(span.start for _, span in members)
    rows: list[int] = []
    written: list[int] = []
    gathered: list[int] = []
    mask: list[list[int]] = []
    for first, span in members:
        slots = [
            span.block_table[position // block_size] * block_size + position % block_size
            for position in range(span.start + new)
        ]
        padding = past - span.start
        rows += range(first, first + new)
        written += slots[span.start :]
        gathered += slots[:1] * padding + slots
        mask.append([0] * padding + [1] * len(slots))
    return Batch(
        torch.tensor(rows, device=device),
        new,
        past,
        torch.tensor(written, device=device),
        torch.tensor(gathered, device=device),
        torch.tensor(mask, device=device),
    )


def _select(step: Tensor, batch: Batch) -> Tensor:
    """The batch's rows of [1, T, ...] as [B, new, ...]."""
    return step[0, batch.rows].view(-1, batch.new, *step.shape[2:])
