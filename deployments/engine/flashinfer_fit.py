"""What FlashInfer has kernels for, on which machines, and how much memory they need: known before it is imported."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch

from deployments.engine.attention_tables import Shape
from placement.flashinfer import why_no_heads

VERSION = "0.6.14"
TENSOR_CORE_GROUP = 4
"""Query heads per KV head from which a decode runs on tensor cores. (On CUDA cores only 1, 2, 3, 4 and 8 exist.)"""

_FP8 = torch.float8_e4m3fn
_CTAS_PER_SM = 2
"""What FlashInfer's scheduler counts on for a prefill."""
_MOST_CTAS_PER_SM = 16
"""Bound on the occupancy of FlashInfer's decode kernel: 2,048 threads of an SM, 128 in a block."""

Method = Literal["decode", "prefill", "own"]


@dataclass(frozen=True)
class Kind:
    """Attention calls that one kernel and one plan serve."""

    heads: int
    kv_heads: int
    head_dim: int
    """Of the blocks, in which heads may be padded."""
    dtype: torch.dtype
    """Of queries and output."""
    kv_dtype: torch.dtype
    window: int | None
    softcap: float | None

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads

    @property
    def window_left(self) -> int:
        """Keys seen before a row's own; -1: all."""
        return -1 if self.window is None else self.window - 1

    def method(self, *, decodes: bool) -> Method:
        """FlashInfer's kernel that a step takes."""
        return "decode" if decodes and self.group < TENSOR_CORE_GROUP else "prefill"


@dataclass(frozen=True)
class Room:
    """Bytes of the buffers that a kind's plans and runs need, for steps of up to so many sequences and rows."""

    floats: int
    """On the device: what parts of a sequence give, before they are merged."""
    ints: int
    """On the device and pinned: the plan."""

    @classmethod
    def of(cls, kind: Kind, sms: int, *, sequences: int, rows: int) -> Room:
        """Upper bounds of what FlashInfer's scheduler (`PrefillPlan`, `DecodePlan`) takes from its workspaces.

        Args:
            sms: the device's multiprocessors.
        """
        split = split_limit(kind, sms)
        tile, decode_tile = (64 if kind.head_dim >= 256 else 128), _decode_tile(kind)
        parts = split * max(tile, 2 * decode_tile)
        ctas = max(2 * split, rows * kind.group // 16 + 1 + sequences)
        if kind.group < TENSOR_CORE_GROUP:
            decode_ctas = _MOST_CTAS_PER_SM * sms // kind.kv_heads
            parts, ctas = max(parts, decode_ctas), max(ctas, decode_ctas)
        # Per CTA three indices and a flag, per row and sequence an offset.
        ints = 13 * ctas + 4 * (rows + sequences) + 512
        return cls(parts * kind.heads * (kind.head_dim + 1) * 4 + 512, -(-ints // 16) * 16)


def fills(kind: Kind, sms: int, shape: Shape) -> bool:
    """Whether decodes fill the device without any sequence split.

    FlashInfer then splits none, but in its mode for graphs it would still write parts and merge them. Its other mode
    does neither, and as nothing is ever split at this size its plan is the same for all steps of it.
    """
    return shape.sequences * -(-kind.group // _decode_tile(kind)) >= split_limit(kind, sms)


def split_limit(kind: Kind, sms: int) -> int:
    """Tiles of queries below which FlashInfer's scheduler splits sequences."""
    return max(1, _CTAS_PER_SM * sms // kind.kv_heads)


def _decode_tile(kind: Kind) -> int:
    """Query heads of one KV head that a tensor-core decode takes at once."""
    return tile_of(kind.group, kind.head_dim)


def tile_of(queries: int, head_dim: int) -> int:
    """Queries of one KV head that are taken at once where there are so many (FlashInfer's `FA2DetermineCtaTileQ`)."""
    if queries > 64 and head_dim < 256:
        return 128
    return 64 if queries > 16 else 16


def why_not(kind: Kind) -> str | None:
    """Why FlashInfer has no kernels for layers of this kind, as the end of a sentence; None: it has."""
    dtype, kv_dtype = dtype_name(kind.dtype), dtype_name(kind.kv_dtype)
    if kind.dtype not in (torch.float16, torch.bfloat16):
        return f"its kernels compute in 16 bits, not {dtype}"
    if kind.kv_dtype not in (kind.dtype, _FP8):
        return f"beside {dtype} its kernels read KV in {dtype} or {dtype_name(_FP8)}, not {kv_dtype}"
    return why_no_heads(kind.heads, kind.kv_heads, kind.head_dim, kv_dtype)


def why_not_here() -> str | None:
    """Why FlashInfer can't run on this machine, as the end of a sentence; None: it can. Does not import it."""
    try:
        found = version("flashinfer-python")
    except PackageNotFoundError:
        return f"flashinfer-python=={VERSION} is not installed"
    if found != VERSION:
        return f"flashinfer-python {found} is installed, and {VERSION} is what Headroom calls"
    homes = [home for name in ("CUDA_HOME", "CUDA_PATH") if (home := os.environ.get(name))] or ["/usr/local/cuda"]
    compilers = [Path(home, "bin", "nvcc") for home in homes]
    if not (shutil.which("nvcc") or any(path.exists() for path in compilers) or find_spec("flashinfer_jit_cache")):
        return "its kernels are compiled on first use, and no nvcc is on PATH or in CUDA_HOME"
    old = [i for i in range(torch.cuda.device_count()) if torch.cuda.get_device_capability(i) < (8, 0)]
    return f"GPU {old[0]} is older than Ampere" if old else None


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
