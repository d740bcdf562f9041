"""Bytes of KV cache per token, layer by layer: MHA, GQA and MQA.

One token holds, in one layer, a key and a value of `head_dim` elements for each KV head:
`2 * kv_heads * head_dim` elements (MHA: `kv_heads = heads`; MQA: 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from placement.errors import PlacementError

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Bytes of one element, by torch's name of the dtype."""


@dataclass(frozen=True, slots=True)
class LayerKv:
    """What one decoder layer caches."""

    kv_heads: int
    head_dim: int
    window: int | None = None
    """Tokens that a sliding-window layer looks back on. Information only: the engine stores all tokens of all
    layers, so the window lowers no byte count."""

    @property
    def elements_per_token(self) -> int:
        """Key and value elements of one token."""
        return 2 * self.kv_heads * self.head_dim


def dtype_bytes(dtype: str) -> int:
    """Bytes of one element.

    Raises:
        PlacementError: a dtype that is not bfloat16, float16 or float32.
    """
    if dtype not in DTYPE_BYTES:
        raise PlacementError(f"dtype {dtype!r} is not known; use one of {', '.join(DTYPE_BYTES)}")
    return DTYPE_BYTES[dtype]


def layer_kv(config: Mapping[str, Any]) -> tuple[LayerKv, ...]:
    """What each decoder layer caches, in order.

    Args:
        config: the text model's config with transformers' standard names and its defaults filled in:
            num_hidden_layers, num_attention_heads, hidden_size, and where the model has them num_key_value_heads,
            head_dim, multi_query, layer_types, sliding_window, kv_lora_rank.

    Raises:
        PlacementError: a cache of another form (MLA, linear attention, recurrent state).
    """
    if config.get("kv_lora_rank"):
        raise PlacementError(
            "multi-head latent attention (kv_lora_rank) is not planned yet; use an MHA, GQA or MQA model"
        )
    heads = config["num_attention_heads"]
    kv_heads = 1 if config.get("multi_query") else config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    return tuple(LayerKv(kv_heads, head_dim, window) for window in _windows(config))


def _windows(config: Mapping[str, Any]) -> list[int | None]:
    count, window = config["num_hidden_layers"], config.get("sliding_window")
    kinds = config.get("layer_types")
    if not kinds:
        return [window] * count
    known = {
        "full_attention": None,
        "sliding_attention": window,
        "chunked_attention": config.get("attention_chunk_size"),
    }
    if unknown := sorted(set(kinds) - known.keys()):
        raise PlacementError(f"layers of type {', '.join(unknown)} keep a cache that is not planned yet")
    return [known[kind] for kind in kinds]
