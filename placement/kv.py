"""Bytes of KV cache and of recurrent state, layer by layer.

    attention (MHA, GQA, MQA)   2 * kv_heads * head_dim elements per token; MHA: kv_heads = heads, MQA: 1
    latent attention (MLA)      kv_lora_rank + qk_rope_head_dim elements per token: the latent is what is cached
    cross-attention (T5)        2 * heads * head_dim elements per token of the encoder's input
    recurrent layers            nothing per token; per sequence a convolution state in the compute dtype and a recurrent
                                state in float32, as transformers caches them:
        gated delta net             conv (2 k_heads k_dim + v_heads v_dim) * kernel; state v_heads * k_dim * v_dim
        Mamba 2                     conv (heads head_dim + 2 groups state) * kernel; state heads * head_dim * state
        Mamba                       conv inner * kernel; state inner * state
        short convolution (LFM2)    conv hidden * kernel

The formulas of MLA and of the recurrent layers are tested against the tensors in transformers' own caches.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from placement.errors import PlacementError

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Bytes of one element, by torch's name of the dtype."""

KV_DTYPE_BYTES = DTYPE_BYTES | {"float8_e4m3fn": 1}
"""The same for the KV cache, which may be narrower than anything that is computed in."""

_KV_ALIASES = {"fp8": "float8_e4m3fn"}
_RECURRENT_BYTES = 4

_KINDS = {
    "full_attention": "attention",
    "attention": "attention",
    "sliding_attention": "attention",
    "chunked_attention": "attention",
    "linear_attention": "state",
    "mamba": "state",
    "recurrent": "state",
    "conv": "state",
    "hybrid": "both",
    "moe": "none",
    "mlp": "none",
}
"""What a layer of each of transformers' types (old names included) caches."""


RELATIVE_CONTEXT = 512
"""Tokens of the longest sequence where an encoder-decoder's config does not say: T5's positions are relative, and
sequences of 512 are what it was trained with."""


@dataclass(frozen=True, slots=True)
class LayerKv:
    """What one layer caches. All zero: nothing (an encoder's layer, an expert block of a hybrid, a layer that reads
    another's keys and values)."""

    kv_heads: int = 0
    head_dim: int = 0
    """As the model has it, or as its blocks have it: see `placement.flashinfer`."""
    window: int | None = None
    """Tokens that a sliding-window layer looks back on. It lowers no byte of a plan: the engine stores all tokens of
    every layer; see `sequence_bytes` for what a cache that frees blocks behind the window would hold."""
    latent: bool = False
    """One vector of `head_dim` elements stands for key and value (MLA)."""
    cross_elements: int = 0
    """Key and value elements of one token of the encoder's input (cross-attention)."""
    conv_elements: int = 0
    """Convolution state of one sequence, in the compute dtype."""
    recurrent_elements: int = 0
    """Recurrent state of one sequence, in float32."""

    @property
    def elements_per_token(self) -> int:
        """Elements of one token of a request, prompt or output.

        In an encoder-decoder a token of the prompt costs its cross-attention and one of the output its self-attention,
        so a block, which may hold either, has room for the larger of the two (T5: they are equal).
        """
        return max((1 if self.latent else 2) * self.kv_heads * self.head_dim, self.cross_elements)

    def state_bytes(self, dtype: str) -> int:
        """Bytes of one sequence's state, however long the sequence; `dtype` is the compute dtype."""
        return self.conv_elements * dtype_bytes(dtype) + self.recurrent_elements * _RECURRENT_BYTES


def dtype_bytes(dtype: str) -> int:
    """Bytes of one element of a compute dtype.

    Raises:
        PlacementError: a dtype that is not bfloat16, float16 or float32.
    """
    if dtype not in DTYPE_BYTES:
        raise PlacementError(f"dtype {dtype!r} is not known; use one of {', '.join(DTYPE_BYTES)}")
    return DTYPE_BYTES[dtype]


def kv_dtype_name(dtype: str) -> str:
    """torch's name of a KV dtype, for which "fp8" is accepted too.

    Raises:
        PlacementError: any other dtype.
    """
    name = _KV_ALIASES.get(dtype, dtype)
    if name not in KV_DTYPE_BYTES:
        known = ", ".join((*KV_DTYPE_BYTES, *_KV_ALIASES))
        raise PlacementError(f"KV dtype {dtype!r} is not known; use one of {known}")
    return name


def kv_dtype_bytes(dtype: str) -> int:
    """Bytes of one element of the KV cache."""
    return KV_DTYPE_BYTES[kv_dtype_name(dtype)]


def why_not_served(layers: Sequence[LayerKv]) -> str | None:
    """What of this cache the engine can't hold yet, in a few words; None when it can hold all of it."""
    if any(kv.conv_elements or kv.recurrent_elements for kv in layers):
        return "recurrent state (Mamba, linear attention or short convolutions)"
    if not all(kv.kv_heads for kv in layers) and not any(kv.cross_elements for kv in layers):
        return "layers without attention"
    return None


def sequence_bytes(
    layers: Iterable[LayerKv], tokens: int, *, kv_dtype: str, dtype: str, window_aware: bool = False
) -> int:
    """Bytes of one sequence of `tokens` tokens in all layers, its recurrent state included.

    Args:
        kv_dtype: of the cache.
        dtype: the compute dtype, in which convolution states are kept.
        window_aware: count what a cache would hold that frees blocks behind sliding windows, rounded to no block.
            The engine's cache does not, so no plan is based on it.
    """
    size, total = kv_dtype_bytes(kv_dtype), 0
    for kv in layers:
        held = min(tokens, kv.window) if window_aware and kv.window else tokens
        total += held * kv.elements_per_token * size + kv.state_bytes(dtype)
    return total


def layer_kv(config: Mapping[str, Any]) -> tuple[LayerKv, ...]:
    """What each layer caches, in the order in which they run (an encoder's layers first).

    Args:
        config: the text model's config with transformers' standard names and its defaults filled in:
            num_hidden_layers, num_attention_heads, hidden_size, and where the model has them num_key_value_heads,
            head_dim, multi_query, layer_types, sliding_window, kv_lora_rank, qk_rope_head_dim, num_kv_shared_layers
            (that many of the last read the keys and values of earlier ones), the sizes of its recurrent layers; of an
            encoder-decoder is_encoder_decoder, encoder_layers, decoder_layers.

    Raises:
        PlacementError: layers whose cache has no formula here, by the name of their type.
    """
    attention = _attention(config)
    if config.get("is_encoder_decoder"):
        cross = LayerKv(attention.kv_heads, attention.head_dim, cross_elements=attention.elements_per_token)
        return (LayerKv(),) * int(config["encoder_layers"]) + (cross,) * int(config["decoder_layers"])
    windows = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
    layers = []
    for kind in _layer_types(config):
        caches = _KINDS[kind]
        conv, recurrent = _state(config, kind) if caches in ("state", "both") else (0, 0)
        layers.append(
            replace(
                attention if caches in ("attention", "both") else LayerKv(),
                window=config.get(windows[kind]) if kind in windows else None,
                conv_elements=conv,
                recurrent_elements=recurrent,
            )
        )
    own = len(layers) - (config.get("num_kv_shared_layers") or 0)
    return (*layers[:own], *(LayerKv() for _ in layers[own:]))


def _attention(config: Mapping[str, Any]) -> LayerKv:
    """A layer of the model's attention, without a window."""
    heads = config.get("decoder_attention_heads") or config.get("num_attention_heads") or 0
    if rank := config.get("kv_lora_rank"):
        return LayerKv(1, rank + config["qk_rope_head_dim"], latent=True)
    if config.get("new_decoder_architecture"):  # Falcon 40B on, where `multi_query` says nothing
        kv_heads = config.get("num_kv_heads") or heads
    else:
        kv_heads = 1 if config.get("multi_query") else config.get("num_key_value_heads") or heads
    head_dim = config.get("attention_head_dim") or config.get("head_dim")
    return LayerKv(kv_heads, head_dim or config["hidden_size"] // max(heads, 1))


def _layer_types(config: Mapping[str, Any]) -> Sequence[str]:
    kinds = config.get("layer_types") or config.get("layers_block_type")
    if not kinds:
        return ["sliding_attention" if config.get("sliding_window") else "full_attention"] * config["num_hidden_layers"]
    if unknown := sorted(set(kinds) - _KINDS.keys()):
        raise PlacementError(f"layers of type {', '.join(unknown)} keep a cache that is not planned yet")
    return list(kinds)


def _state(config: Mapping[str, Any], kind: str) -> tuple[int, int]:
    """Elements of a sequence's convolution and recurrent state in one layer."""

    def first(*names: str) -> int:
        return next((int(config[name]) for name in names if config.get(name)), 0)

    if kind == "conv" and first("conv_L_cache"):
        return first("hidden_size") * first("conv_L_cache"), 0
    if v_heads := first("linear_num_value_heads"):
        k_dim, v_dim = first("linear_key_head_dim"), first("linear_value_head_dim")
        channels = 2 * first("linear_num_key_heads") * k_dim + v_heads * v_dim
        return channels * first("linear_conv_kernel_dim"), v_heads * k_dim * v_dim
    kernel, state = first("mamba_d_conv", "conv_kernel"), first("mamba_d_state", "ssm_state_size")
    if kernel and state:
        head_dim = first("mamba_d_head", "mamba_head_dim", "mamba_headdim")
        if inner := first("mamba_n_heads", "mamba_num_heads", "n_mamba_heads") * head_dim:
            groups = first("mamba_n_groups", "mamba_ngroups", "n_groups")
            return (inner + 2 * groups * state) * kernel, inner * state
        if expand := first("mamba_expand"):
            inner = expand * first("hidden_size")
            return inner * kernel, inner * state
    raise PlacementError(
        f"layers of type {kind} keep a state whose sizes {config.get('model_type', 'this config')} does not name in a "
        "way that is known here; its cache is not planned yet"
    )
