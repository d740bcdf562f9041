"""Decodes of few sequences, where launches weigh more than arithmetic: one kernel in place of FlashInfer's three.

FlashInfer writes the step's keys and values, attends in parts, and merges these. Here one kernel does all, and needs no
plan: how the keys are divided follows from the tables that it reads on the device.
"""

from __future__ import annotations

import math
import os
import shutil

import torch
from torch import Tensor

from deployments.engine.attention_tables import Shape, Tables
from deployments.engine.flashinfer_fit import Kind

MOST_SEQUENCES = 8
"""Beyond it FlashInfer fills the device without many parts, and its merging weighs little."""
MOST_KV_HEADS = 128
_MOST_GROUP = 16
"""Query heads of a KV head that matrix instructions take at once."""
_TILE_ELEMENTS = 4096
"""Of the keys that a program takes at once; with those ahead and the values four times as many are in registers."""
_PROGRAMS_PER_SM = 2


def can_compile() -> bool:
    """Whether Triton finds a C compiler, which a launch needs; FlashInfer's own kernels may be there as files."""
    return any([os.environ.get("CC"), shutil.which("gcc"), shutil.which("clang")])


def takes(kind: Kind, shape: Shape) -> bool:
    """Whether the kernel can run a step's layers of one kind, and is made for so few sequences."""
    few = shape.decodes and shape.sequences <= MOST_SEQUENCES and kind.kv_heads <= MOST_KV_HEADS
    plain = kind.window is None and kind.softcap is None and kind.kv_dtype == kind.dtype
    return few and plain and kind.group <= _MOST_GROUP


def splits_of(kind: Kind, sequences: int, sms: int) -> int:
    """Programs that share the keys of a sequence and KV head; a power of two, so that there are few cases."""
    share = _PROGRAMS_PER_SM * sms // (kind.kv_heads * sequences)
    return 1 << max(0, share.bit_length() - 1)


def counters(device: torch.device) -> Tensor:
    """int32, zeros: how many parts of each sequence and KV head are done. The kernel leaves zeros behind."""
    return torch.zeros(MOST_SEQUENCES * MOST_KV_HEADS, dtype=torch.int32, device=device)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    tables: Tables,
    *,
    scale: float,
    splits: int,
    space: Tensor,
    arrivals: Tensor,
    overlap: bool,
) -> None:
    """Write each sequence's row to the blocks, and attend with it over all its keys, in one launch.

    Args:
        query: [rows, heads, head_dim], a head's elements next to each other, as in `key`, `value` and `out`.
        key: [rows, kv_heads, head_dim].
        keys: [blocks, block_size, kv_heads, head_dim], contiguous, like `values`.
        out: [rows, heads, head_dim], contiguous.
        splits: programs for each sequence and KV head.
        space: uint8, for their parts: 4 * (head_dim + 2) bytes for each and query head are used.
        arrivals: `counters` of the device.
        overlap: the kernel starts while the one before ends.
    """
    from deployments.engine.kernels.attend import attend_kernel  # Triton is there only beside CUDA

    rows, heads, head_dim = query.shape
    kv_heads = key.shape[1]
    parts = rows * heads * splits
    floats = space.view(torch.float32)
    attend_kernel[splits, kv_heads, rows](
        *(query, key, value, keys, values, out, tables.page_starts, tables.pages, tables.lengths),
        *(floats, floats[parts * head_dim :], floats[parts * (head_dim + 1) :], arrivals),
        scale * math.log2(math.e),
        *(query.stride(0), query.stride(1), key.stride(0), key.stride(1), value.stride(0), value.stride(1)),
        splits,
        GROUP=heads // kv_heads,
        HEADS=1 << (heads // kv_heads - 1).bit_length(),
        D=head_dim,
        BLOCK_SIZE=keys.shape[1],
        TILE=min(32, _TILE_ELEMENTS // head_dim),
        OVERLAP=overlap,
        **({"launch_pdl": True} if overlap else {}),
    )
