"""Attention of decodes: one kernel in place of FlashInfer's three.

FlashInfer writes the step's keys and values, attends in splits, and merges these. Here one kernel does all, and needs
no plan: how the keys are divided follows from the tables that it reads on the device.
"""

from __future__ import annotations

import math
import os
import shutil

import torch
from torch import Tensor

from deployments.engine.attention_tables import Shape, Tables
from deployments.engine.flashinfer_fit import Kind

_MOST_HEADS = 2**14
"""KV heads of all sequences together."""
_MOST_GROUP = 16
"""Query heads of a KV head that matrix instructions take at once."""
_TILE_ELEMENTS = 8192
"""Of the keys that a program takes at once."""
_TILES_AHEAD = 2
_WARPS = 2
"""Of a program. With 4 it waits as long for its keys, and fewer programs are at work."""
_PROGRAMS = 512
"""For what long sequences are divided into; about four for each multiprocessor of a large device."""
_OVERLAPS = 64
"""Sequences up to which the kernel starts while the one before ends: where programs fill the device they would wait in
the way of others."""


def can_compile() -> bool:
    """Whether Triton finds a C compiler, which a launch needs; FlashInfer's own kernels may be there as files."""
    return any([os.environ.get("CC"), shutil.which("gcc"), shutil.which("clang")])


def takes(kind: Kind, shape: Shape) -> bool:
    """Whether the kernel can run layers of a kind in a step, or the part of one, whose sequences have one row each."""
    fits = kind.group <= _MOST_GROUP and shape.sequences * kind.kv_heads <= _MOST_HEADS
    return fits and kind.window is None and kind.softcap is None and kind.kv_dtype == kind.dtype


def splits_beyond(kv_heads: int) -> int:
    """Splits of a step's sequences beyond one each."""
    return max(16, _PROGRAMS // kv_heads)


def space_bytes(kind: Kind, sequences: int, splits: int) -> int:
    """What the splits need before they are merged: sums, weights and largest scores of each query head."""
    return 4 * _parts(sequences + splits, kind.heads) * (kind.head_dim + 2)


def _parts(items: int, heads: int) -> int:
    """Of query heads; a multiple of 4, as Triton makes another kernel for arrays that don't start at 16 bytes."""
    return -(-items * heads // 4) * 4


def counters(device: torch.device) -> Tensor:
    """int32, zeros: how many splits of each sequence and KV head are done. The kernel leaves zeros behind."""
    return torch.zeros(_MOST_HEADS, dtype=torch.int32, device=device)


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
        query: [rows, heads, head_dim], a head's elements next to each other, as in `key`, `value` and `out`. The first
            rows are those of the tables' sequences.
        key: [rows, kv_heads, head_dim].
        keys: [blocks, block_size, kv_heads, head_dim], contiguous, like `values`.
        out: [rows, heads, head_dim], contiguous.
        tables: of sequences with one row each; those without rows are the last ones.
        splits: beyond one for each sequence, that the tables have at most.
        space: uint8, `space_bytes` at least.
        arrivals: `counters` of the device.
        overlap: the kernel may start while the one before ends.
    """
    from deployments.engine.kernels.attend import attend_kernel  # Triton is there only beside CUDA

    heads, head_dim = query.shape[1:]
    kv_heads, rows = key.shape[1], tables.shape.sequences
    items, overlap = rows + splits, overlap and rows <= _OVERLAPS
    parts, floats = _parts(items, heads), space.view(torch.float32)
    attend_kernel[kv_heads, items](
        *(query, key, value, keys, values, out, tables.page_starts, tables.pages, tables.lengths),
        *(tables.split_starts, tables.split_tokens),
        *(floats, floats[parts * head_dim :], floats[parts * (head_dim + 1) :], arrivals),
        scale * math.log2(math.e),
        *(query.stride(0), query.stride(1), key.stride(0), key.stride(1), value.stride(0), value.stride(1)),
        *(rows, items),
        GROUP=heads // kv_heads,
        HEADS=1 << (heads // kv_heads - 1).bit_length(),
        D=head_dim,
        BLOCK_SIZE=keys.shape[1],
        TILE=min(64, _TILE_ELEMENTS // head_dim),
        STAGES=_TILES_AHEAD,
        ROWS=4 ** max(2, -(-(rows - 1).bit_length() // 2)),  # so that there are few kernels
        OVERLAP=overlap,
        num_warps=_WARPS,
        **({"launch_pdl": True} if overlap else {}),
    )
