"""What FlashInfer has kernels for, and at which head size KV blocks are stored for it: the next, with zeros behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from placement import encoder_decoder as cross
from placement.footprint import Footprint
from placement.kv import LayerKv, dtype_bytes, kv_dtype_bytes
from placement.workload import Attention, Workload

_THREADS = 1024
"""Most threads of a CUDA block: each writes eight elements of a token's heads."""


def head_sizes(kv_dtype: str) -> tuple[int, ...]:
    """Head sizes that FlashInfer has kernels for. Its prefill kernel does not read 8 bits with heads of 64."""
    return (128, 256) if kv_dtype_bytes(kv_dtype) == 1 else (64, 128, 256)


def stored_head(head_dim: int, kv_dtype: str) -> int:
    """The size at which FlashInfer's blocks hold heads of `head_dim`: the next that it has kernels for, where that is
    twice as large at most. Behind the model's elements are zeros, which change no score."""
    sizes = (size for size in head_sizes(kv_dtype) if head_dim <= size <= 2 * head_dim)
    return next(sizes, head_dim)


def why_no_heads(heads: int, kv_heads: int, stored: int, kv_dtype: str) -> str | None:
    """Why FlashInfer has no kernels for so many query and KV heads that are stored at a size, as the end of a sentence;
    None: it has."""
    if stored not in head_sizes(kv_dtype):
        known = ", ".join(map(str, head_sizes(kv_dtype)))
        return f"it has kernels for {kv_dtype} KV with heads of {known}, not of {stored}"
    if heads % kv_heads:
        return f"{heads} query heads do not share {kv_heads} KV heads evenly"
    if kv_heads * stored // 8 > _THREADS:
        return f"{kv_heads} KV heads of size {stored} are more than one block of threads writes"
    return None


def stored_kv(layers: Sequence[LayerKv], kv_dtype: str, attention: Attention) -> tuple[LayerKv, ...]:
    """What each layer caches, with the head size that its blocks have under an attention backend. Plans count it and
    the engine allocates it."""
    if attention == "torch":
        return tuple(layers)
    return tuple(replace(kv, head_dim=stored_head(kv.head_dim, kv_dtype)) for kv in layers)


def why_not_flashinfer(footprint: Footprint, workload: Workload) -> str | None:
    """Why FlashInfer can't compute a model's attention on any GPU, as the end of a sentence; None: it can."""
    dtype, kv_dtype = footprint.dtype, workload.kv_dtype
    if footprint.geometry.own_attention:
        return footprint.geometry.own_attention
    if cross.encodes(footprint):
        return "an encoder-decoder attends to what is gathered from the blocks"
    if dtype_bytes(dtype) != 2:
        return f"its kernels compute in 16 bits, not {dtype}"
    if kv_dtype != dtype and kv_dtype_bytes(kv_dtype) != 1:
        return f"beside {dtype} its kernels read KV in {dtype} or fp8, not {kv_dtype}"
    for kv in stored_kv(footprint.geometry.kv, kv_dtype, "flashinfer"):
        if kv.latent:
            return "latent attention is computed otherwise"
        if kv.kv_heads and (reason := why_no_heads(footprint.geometry.heads, kv.kv_heads, kv.head_dim, kv_dtype)):
            return reason
    return None


def gpu_attention(footprint: Footprint, workload: Workload) -> Attention:
    """What computes a model's attention on GPUs."""
    if footprint.geometry.own_attention is not None:
        return "torch"
    return workload.attention or ("torch" if why_not_flashinfer(footprint, workload) else "flashinfer")
