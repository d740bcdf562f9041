"""What a forward takes where keys and values are gathered from their blocks for attention in the model's own code.

The gather cache (`deployments.engine.gather`) runs a step as forwards that take so many bytes at most, by what they
gather in a layer, padding included, and by the pairs of a new token and one that it attends to. One sequence's row,
which can't be divided, may take more. With s bytes in the compute dtype, d the head size, and h the heads that the
model's cache is handed (all of them, save in multi-query attention: one):

    a gathered token    h d (3s + 4)        keys and values as gathered, and as most models copy them once more: one in
                                            the layout of a product, one in float32
    latent (MLA)        2s (latent + keys and values of all heads): the latent as gathered and its parts, and what is
                        expanded from it
    a pair              heads (3s + 8) + 8  scores, masked scores and the weights of the layer before, which models hand
                                            on; scores and weights in float32, as most models compute them; the mask,
                                            once as bool and once in the compute dtype
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from placement.footprint import Footprint
from placement.kv import LayerKv, dtype_bytes
from placement.workload import Workload

FORWARD_BYTES = 2**29
"""Of a forward of several sequences or rows. Scores are made anew for each layer and differ in size from step to step,
so what the allocator can't reuse grows with them too."""

EXPANDS = "kv_b_proj"
"""Name of the linear that makes keys and values of all heads from a latent; keys are completed in a copy."""

_SCORE_COPIES, _FLOAT_SCORES, _MASK_BYTES = 3, 8, 8


@dataclass(frozen=True, slots=True)
class Bound:
    """What bounds a forward, in bytes of one layer's attention."""

    token_bytes: int
    """Of a gathered token, in the layer that takes the most."""
    pair_bytes: int
    """Of a new token and one that it attends to."""
    most: int
    """Of a forward, `FORWARD_BYTES` or a row of the longest sequence."""

    def tokens(self, rows: int) -> int:
        """Gathered at most for sequences that have so many new rows each."""
        return self.most // (self.token_bytes + rows * self.pair_bytes)


def bound(heads: int, kv: Iterable[LayerKv], dtype: str, expanded: int, longest: int) -> Bound:
    """The bound that the engine keeps to, and that a plan counts on.

    Args:
        heads: of queries.
        kv: what each layer caches.
        dtype: that is computed in.
        expanded: elements per token that a latent is expanded to, in all heads; 0 where none is cached.
        longest: tokens of the longest sequence.
    """
    size = dtype_bytes(dtype)
    token = max((_token_bytes(heads, each, size, expanded) for each in kv), default=0)
    pair = heads * (_SCORE_COPIES * size + _FLOAT_SCORES) + _MASK_BYTES
    return Bound(token, pair, max(FORWARD_BYTES, longest * (token + pair)))


def planned(footprint: Footprint, longest: int) -> Bound:
    """The bound of a model that is not loaded."""
    tensors = (tensor for layer in footprint.layers for tensor in layer.tensors)
    expanded = max((t.shape[0] for t in tensors if t.name.endswith(f"{EXPANDS}.weight")), default=0)
    geometry = footprint.geometry
    return bound(geometry.heads, geometry.kv, footprint.dtype, expanded, longest)


@dataclass(frozen=True, slots=True)
class Room:
    """What attention takes on a device, of whose activations a part is not there while it does."""

    scores: int
    """Of all pairs of a step."""
    per_block: int
    """Of a gathered KV block."""
    most: int
    """Of both."""
    spared: int
    """Of the activations."""

    def taken(self, blocks: int) -> int:
        """Bytes beside the activations, where there are so many KV blocks."""
        return max(0, min(self.most, self.scores + blocks * self.per_block) - self.spared)


def room(footprint: Footprint, workload: Workload, activations: int) -> Room:
    """The room of a model that is not loaded, with so many bytes of activations per token of a step."""
    limit, rows = planned(footprint, workload.max_context), workload.max_batch_tokens
    scores, per_block = rows * workload.max_context * limit.pair_bytes, workload.block_size * limit.token_bytes
    most = min(limit.most, scores + workload.most_blocks * per_block)
    return Room(scores, per_block, most, rows * max(0, activations - _attending_bytes(footprint)))


def _attending_bytes(footprint: Footprint) -> int:
    """Per token of a step while a layer attends, beside the above: input, residual, normed and output, and what
    attention's products result in; those of all products where names don't tell which are its."""
    widths = []
    for layer in footprint.layers:
        matrices = [tensor for tensor in layer.tensors if len(tensor.shape) == 2]
        own = [tensor for tensor in matrices if "att" in tensor.name] or matrices
        widths.append(sum(tensor.shape[0] for tensor in own))
    return dtype_bytes(footprint.dtype) * (4 * footprint.geometry.hidden + max(widths, default=0))


def _token_bytes(heads: int, kv: LayerKv, size: int, expanded: int) -> int:
    if kv.latent:
        return 2 * size * (kv.head_dim + expanded)
    return (kv.kv_heads if kv.kv_heads < 2 else heads) * kv.head_dim * (3 * size + 4)
