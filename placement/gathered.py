"""What a forward takes where keys and values are gathered from their blocks for attention in the model's own code.

The gather cache (`deployments.engine.gather`) runs a step as forwards that are bounded in two ways: by the tokens that
are gathered in a layer, padding included, and by the pairs of a new token and one that it attends to. One sequence's
row, which can't be divided, may have more of both. With s bytes in the compute dtype, d the head size, and h the heads
that the model's cache is handed (all of them, save in multi-query attention: one):

    a gathered token    h d (3s + 4)     keys and values as gathered, and as most models copy them once more: one in
                                         the layout of a product, one in float32
    latent (MLA)        2s (latent + keys and values of all heads): the latent as gathered and its parts, and what is
                        expanded from it
    a pair              12 heads + 8     scores, masked scores and weights, in float32 as most models compute them; the
                                         mask, once as bool and once in the compute dtype
"""

from __future__ import annotations

from placement.footprint import Footprint
from placement.kv import LayerKv, dtype_bytes
from placement.workload import Workload

TOKENS = 65_536
"""Gathered at most in one forward for several sequences."""
PAIRS = 2**22
"""Scored at most in one forward of several rows: at 32 heads 1.6 GB."""

_SCORE_BYTES, _MASK_BYTES = 12, 8


def most_tokens(longest: int) -> int:
    """Tokens that a forward gathers at most, where a sequence has up to `longest`."""
    return max(longest, TOKENS)


def most_blocks(workload: Workload) -> int:
    """Blocks of them."""
    return -(-most_tokens(workload.max_context) // workload.block_size)


def most_pairs(longest: int) -> int:
    """Pairs that a forward scores at most, where a sequence has up to `longest` tokens."""
    return max(longest, PAIRS)


def scores_bytes(footprint: Footprint, rows: int, longest: int) -> int:
    """Of all pairs of a forward, in one layer, where a step has so many rows."""
    return min(rows * longest, most_pairs(longest)) * pair_bytes(footprint)


def pair_bytes(footprint: Footprint) -> int:
    """Of a pair, in one layer."""
    return _SCORE_BYTES * footprint.geometry.heads + _MASK_BYTES


def token_bytes(footprint: Footprint) -> int:
    """Of a gathered token, in the layer that takes the most."""
    return max((_token_bytes(footprint, kv) for kv in footprint.geometry.kv), default=0)


def _token_bytes(footprint: Footprint, kv: LayerKv) -> int:
    size = dtype_bytes(footprint.dtype)
    if kv.latent:
        return 2 * size * (kv.head_dim + _expanded(footprint))
    heads = kv.kv_heads if kv.kv_heads < 2 else footprint.geometry.heads
    return heads * kv.head_dim * (3 * size + 4)


def _expanded(footprint: Footprint) -> int:
    """Elements of keys and values of all heads that a latent is expanded to; keys are completed in a copy."""
    tensors = (tensor for layer in footprint.layers for tensor in layer.tensors)
    return max((t.shape[0] for t in tensors if t.name.endswith("kv_b_proj.weight")), default=0)
