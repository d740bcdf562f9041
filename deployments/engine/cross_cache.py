"""What an encoder-decoder's cross-attention reads and writes: keys and values of the encoder's tokens, in KV blocks.

The counterpart of `gather.GatherLayer`, which serves self-attention. In a fresh sequence's forward the layer computes
keys and values of the whole prompt, which `update` writes; in later ones it asks for those there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, EncoderDecoderCache
from transformers.cache_utils import CacheLayerMixin

from deployments.engine.attention import PagedKv, UnsupportedAttention, indexable, stored
from deployments.engine.cross_batches import DecoderBatch
from deployments.engine.gather import GatherLayer


class CrossLayer(CacheLayerMixin):
    """One layer's cross-attention in one forward.

    Args:
        kv: its blocks; None for a layer of another stage, which is asked for lengths alone.
        batch: the forward's sequences.
        dtype: in which they are computed.
    """

    def __init__(self, kv: PagedKv | None, batch: DecoderBatch, dtype: torch.dtype) -> None:
        self.is_initialized = True
        self.uses = 0
        self._kv = kv
        self._batch = batch
        self._dtype = dtype

    @property
    def keys(self) -> Tensor:  # type: ignore[override]  # transformers' is an attribute
        """[B, heads, longest, size]."""
        self.uses += 1
        return self._read(self._held.keys)

    @property
    def values(self) -> Tensor:  # type: ignore[override]  # transformers' is an attribute
        """[B, heads, longest, size]."""
        return self._read(self._held.values)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the prompts' keys and values, each [B, heads, longest, size]; they are handed back as the cache has
        them.

        Raises:
            UnsupportedAttention: the layer caches other shapes than the plan counts.
        """
        self.uses += 1
        return self._through(self._held.keys, key_states), self._through(self._held.values, value_states)

    def get_seq_length(self) -> int:
        """Encoder tokens in the cache before the forward, padding included."""
        return 0 if self._batch.fresh is not None else self._batch.places.shape[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys, index of the first), however many queries."""
        del query_length
        return self._batch.places.shape[1], 0

    def get_max_length(self) -> int:
        """-1: none."""
        return -1

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The blocks are there already."""

    @property
    def _held(self) -> PagedKv:
        if self._kv is None:
            raise UnsupportedAttention("a layer attends over the cache of a layer on another stage")
        return self._kv

    def _read(self, blocks: Tensor) -> Tensor:
        flat = indexable(blocks).flatten(0, 1)
        found = flat.index_select(0, self._batch.places.flatten()).view(blocks.dtype).to(self._dtype)
        return found.view(*self._batch.places.shape, *blocks.shape[2:]).transpose(1, 2)

    def _through(self, blocks: Tensor, new: Tensor) -> Tensor:
        want = (*self._batch.places.shape, *blocks.shape[2:])
        rows = new.transpose(1, 2)
        if rows.shape != want:
            raise UnsupportedAttention(f"cross-attention caches {tuple(rows.shape)}, and its config promises {want}")
        fresh = self._batch.fresh
        assert fresh is not None, "transformers asks for what is in the cache instead"
        kept = stored(rows, blocks.dtype)
        tokens = indexable(kept).flatten(0, 1).index_select(0, fresh.kept)
        indexable(blocks).flatten(0, 1).index_copy_(0, fresh.written, tokens)
        return kept.to(new.dtype).transpose(1, 2)


class CrossCache:
    """The cache of a stage's decoder layers in one forward.

    Args:
        kv: the stage's blocks, by the layer's index in the decoder.
        batch: the forward's sequences.
        dtype: in which they are computed.
    """

    def __init__(self, kv: Mapping[int, PagedKv], batch: DecoderBatch, dtype: torch.dtype) -> None:
        self._held = tuple(kv)
        self._own = [GatherLayer(kv.get(index), batch.own) for index in range(max(kv) + 1)]
        self._cross = [CrossLayer(kv.get(index), batch, dtype) for index in range(max(kv) + 1)]
        self.shown = EncoderDecoderCache(Cache(layers=[*self._own]), Cache(layers=[*self._cross]))
        """As transformers takes it."""

    def check(self) -> None:
        """Raise `UnsupportedAttention` unless each layer attended once to its own tokens and once to the encoder's."""
        for index in self._held:
            uses = self._own[index].updates, self._cross[index].uses
            if uses != (1, 1):
                raise UnsupportedAttention(
                    f"layer {index} attends {uses[0]} times to its own tokens and {uses[1]} times to the encoder's"
                )
