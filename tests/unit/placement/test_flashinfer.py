"""Which heads FlashInfer has kernels for, and how KV is stored for it; the engine says the same."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

from deployments.engine.flashinfer_fit import Kind, why_not
from placement.flashinfer import stored_head, stored_kv, why_not_flashinfer
from placement.kv import LayerKv
from placement.workload import Workload
from tests.unit.placement.toy import toy_footprint

WORKLOAD = Workload(block_size=16, max_batch_tokens=8, max_sequences=4, max_context=64, kv_dtype="float16")


@pytest.mark.parametrize(
    ("kv_dtype", "stored"),
    [
        ("bfloat16", {16: 16, 32: 64, 64: 64, 80: 128, 96: 128, 112: 128, 128: 128, 160: 256, 256: 256, 512: 512}),
        ("float8_e4m3fn", {32: 32, 48: 48, 64: 128, 80: 128, 128: 128, 192: 256}),
    ],
)
def test_heads_are_stored_at_the_next_size_that_flashinfer_has(kv_dtype: str, stored: dict[int, int]) -> None:
    """Of twice their own at most."""
    assert {size: stored_head(size, kv_dtype) for size in stored} == stored
    layers = tuple(LayerKv(8, size, window=9) for size in stored)
    assert stored_kv(layers, kv_dtype, "flashinfer") == tuple(LayerKv(8, size, window=9) for size in stored.values())
    assert stored_kv(layers, kv_dtype, "torch") == layers


def test_why_not_flashinfer_is_what_the_engine_says() -> None:
    dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    stored = {**dtypes, "float8_e4m3fn": torch.float8_e4m3fn}
    for (dtype, computed), (kv_dtype, kept), head_dim in product(
        dtypes.items(), stored.items(), (16, 32, 64, 80, 96, 128, 192, 256, 512)
    ):
        weighed = replace(toy_footprint([10], kv=(LayerKv(2, head_dim),)), dtype=dtype)
        ours = why_not_flashinfer(weighed, replace(WORKLOAD, kv_dtype=kv_dtype))
        theirs = why_not(Kind(2, 2, stored_head(head_dim, kv_dtype), computed, kept, None, None))
        assert (ours is None) == (theirs is None), (ours, theirs)
    kinds = product((96, 64, 6), (96, 64, 4), (64, 80), ("bfloat16", "float8_e4m3fn"))
    for heads, kv_heads, head_dim, kv_dtype in kinds:
        weighed = replace(toy_footprint([10], kv=(LayerKv(kv_heads, head_dim),)), dtype="bfloat16")
        weighed = replace(weighed, geometry=replace(weighed.geometry, heads=heads))
        ours = why_not_flashinfer(weighed, replace(WORKLOAD, kv_dtype=kv_dtype))
        kind = Kind(heads, kv_heads, stored_head(head_dim, kv_dtype), torch.bfloat16, stored[kv_dtype], None, None)
        assert ours == why_not(kind)
        assert (ours is None) == (heads % kv_heads == 0 and kind.kv_heads * kind.head_dim <= 8192)
    latent = toy_footprint([10], kv=(LayerKv(1, 64, latent=True),))
    assert why_not_flashinfer(latent, WORKLOAD) == "latent attention is computed otherwise"
