"""What a step of an encoder-decoder (T5) takes beside weights and KV, in the widest layer.

The engine (`deployments.engine.encoder_decoder`) runs each stack in transformers' own code: a step's prompts as batches
of no more rows than the step has, and decodes as batches that gather a bounded number of tokens from their blocks. With
s bytes in the compute dtype, w those of hidden states between layers (4 where the model keeps a weight in float32, as
T5 does in float16), h the hidden size, i the width of its attention, and f that of its largest projection:

    a row               h (6w + 8 + 2s)     the step's hidden states before and after a stack, what a batch reads and
                                            hands back, two of a layer, and a norm in float32
                        + 6 i s             queries, keys, values, result, its transposed copy, and a copy of keys
                                            while they are written; or, if that is more, of the feed-forward
                        + f max(4s, (n+1) s + w')  its n projections and their product, w' = w where it is more than s;
                                            or what the activation function makes on its way
    a gathered token    elements * s        keys and values of one kind of attention at a time; of an 8-bit cache one of
                                            them in 8 bits too
                        + heads (2s + 8)    scores, or what is added to them and its aligned copy
                        + 64                where it is, and masks
"""

from __future__ import annotations

from placement.footprint import Footprint, Module
from placement.gathered import Room
from placement.kv import dtype_bytes, kv_dtype_bytes
from placement.workload import Workload

TOKENS = 32_768
"""Of which a batch gathers keys and values at once at most. An estimate, not measured: on an H200, reading them should
take about as long as launching a step of T5-3B."""

_PADDING = 2
"""What is gathered is padded to at most so many times what sequences hold."""
_LAYOUT_BYTES = 34
"""Per padded token of a step: two places and a mask as integers, one as booleans."""
_TOKEN_BYTES = 64


def encodes(footprint: Footprint) -> bool:
    """Whether a model is an encoder-decoder."""
    return any(kv.cross_elements for kv in footprint.geometry.kv)


def most_tokens(longest: int) -> int:
    """Tokens that a batch gathers at most, where a sequence has up to `longest`."""
    return max(longest, TOKENS)


def hidden_bytes(footprint: Footprint) -> int:
    """Of an element of hidden states between layers."""
    own = (tensor.itemsize for layer in footprint.layers for tensor in layer.tensors if not tensor.linear)
    return max(dtype_bytes(footprint.dtype), *own)


def activation_bytes(footprint: Footprint) -> int:
    """Per row of a step, in the layer that takes the most."""
    size, wide = dtype_bytes(footprint.dtype), hidden_bytes(footprint)
    between = footprint.geometry.hidden * (6 * wide + 8 + 2 * size)
    attention = 6 * size * _elements(footprint) // 2
    return between + max(attention, *(_feed_forward_bytes(layer, size, wide) for layer in footprint.layers))


def _feed_forward_bytes(layer: Module, size: int, wide: int) -> int:
    outs = [tensor.shape[0] for tensor in layer.tensors if len(tensor.shape) > 1]
    widest = max(outs, default=0)
    cast = wide if wide > size else 0
    return widest * max(4 * size, (outs.count(widest) + 1) * size + cast)


def _elements(footprint: Footprint) -> int:
    return max(kv.elements_per_token for kv in footprint.geometry.kv)


def _block_bytes(footprint: Footprint, workload: Workload) -> int:
    """Gathered of one block in one layer, and padded."""
    size, kv_size = dtype_bytes(footprint.dtype), kv_dtype_bytes(workload.kv_dtype)
    elements = _elements(footprint)
    narrow = elements // 2 * kv_size if workload.kv_dtype != footprint.dtype else 0
    token = elements * size + narrow + footprint.geometry.heads * (2 * size + 8) + _TOKEN_BYTES
    return _PADDING * workload.block_size * token


def room(footprint: Footprint, workload: Workload) -> Room:
    """What attention takes: of the blocks that a batch gathers at most, padded."""
    most, each = (
        -(-most_tokens(workload.max_context) // (_PADDING * workload.block_size)),
        _block_bytes(footprint, workload),
    )
    return Room(scores=0, per_block=each, most=most * each, spared=0)


def layout_bytes(workload: Workload) -> int:
    """Of a step's batches: rows, places and masks."""
    return _PADDING * _LAYOUT_BYTES * workload.max_sequences * workload.max_context
