"""From tensors to kernel launches on a CUDA device. Imports Triton.

Products run on the tiled weight: of a few rows in `skinny.cu` where clusters of blocks are, of tens to thousands in
`wide.cu` on GPUs that it is written for, elsewhere of up to 128 or so in Triton's kernels. Larger ones, and weights
that are not tiled, are dequantised into the workspace's buffer and multiplied by cuBLAS, in runs of rows where the
buffer is smaller than the weight.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from deployments.engine.kernels import gemm
from deployments.engine.kernels.config import (
    PANELS,
    Entry,
    GemmConfig,
    Kind,
    Table,
    bucket_of,
    cut_rows_of,
    table_for,
)
from deployments.engine.kernels.cut import MOST_ROWS, Cut, choose_cut, groups_of
from deployments.engine.kernels.repack import TILE_COLUMNS, TILE_ROWS
from deployments.engine.kernels.schedule import Schedule, make_schedule
from deployments.engine.kernels.skinny import skinny_product
from deployments.engine.kernels.slab import Slab, choose_slab
from deployments.engine.kernels.weights import Weight4, Weight8
from deployments.engine.kernels.wide import wide_product
from deployments.engine.kernels.workspace import Workspace, prepare

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Triton's interpreter runs the kernels on the CPU: no inline PTX, no device to ask."""
_FLAT_BLOCK = 4096


def product(x: Tensor, weight: Weight4 | Weight8, bias: Tensor | None) -> Tensor:
    """`x @ dequantise(weight).T + bias` for x [rows, k] -> [rows, n] in x's dtype.

    How it is computed follows from the weight, the device and the number of rows alone: a row's bits are the same
    whatever the other rows are, and `invariant.py` counts on it.
    """
    entry = _entry(x, weight)
    small = weight.tiled and x.dtype in (torch.bfloat16, torch.float16)
    cut = _cut(entry, weight, x.shape[0], x.device) if small else None
    if isinstance(cut, Cut):
        return skinny_product(x, weight, bias, cut)
    return product_without_cuda(x, weight, bias) if cut is None else wide_product(x, weight, bias, cut)


def product_without_cuda(x: Tensor, weight: Weight4 | Weight8, bias: Tensor | None = None) -> Tensor:
    """`product` without `skinny.cu` and `wide.cu`: Triton's kernels up to the crossover, dequantised above it."""
    entry, rows = _entry(x, weight), x.shape[0]
    if weight.tiled and x.dtype in (torch.bfloat16, torch.float16) and rows <= entry.crossover:
        bucket = bucket_of(rows)
        return small_product(x, weight, bias, entry.configs[bucket], bucket=bucket)
    return dequantised_product(x, weight, bias)


def _entry(x: Tensor, weight: Weight4 | Weight8) -> Entry:
    kind: Kind = "4bit" if isinstance(weight, Weight4) else "8bit"
    return table_of(x.device).entry(kind, weight.n, weight.k)


def _cut(entry: Entry, weight: Weight4 | Weight8, rows: int, device: torch.device) -> Cut | Slab | None:
    most = cut_rows_of(rows)
    if rows == 0 or most is None or not clusters(device):
        return None
    if most in entry.cuts:
        return entry.cuts[most]
    bits = 4 if isinstance(weight, Weight4) else 8
    sizes = (multiprocessors(device), shared_bytes(device))
    if most <= MOST_ROWS:
        return choose_cut(weight.n, weight.k, bits, groups_of(rows), *sizes)
    return choose_slab(weight.n, weight.k, bits, most, *sizes) if warpgroups(device) else None


@cache
def clusters(device: torch.device) -> bool:
    """Whether blocks can read each other's shared memory, as `skinny.cu` wants it."""
    return not INTERPRETED and torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def warpgroups(device: torch.device) -> bool:
    """Whether the GPU has the matrix instructions that `wide.cu` is written in."""
    return not INTERPRETED and torch.cuda.get_device_capability(device) == (9, 0)


@cache
def shared_bytes(device: torch.device) -> int:
    """Of a block, at most: what the device grants on request, less a KiB as a margin."""
    properties: Any = torch.cuda.get_device_properties(device)  # torch's annotations lack it
    return int(properties.shared_memory_per_block_optin) - 2**10


@cache
def multiprocessors(device: torch.device) -> int:
    """Of the device; a handful under the interpreter, enough to share panels."""
    return 5 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


def table_of(device: torch.device) -> Table:
    """The device's configurations."""
    if INTERPRETED:
        return table_for("interpreter")
    return table_for(torch.cuda.get_device_name(device), shared_bytes(device))


def small_product(
    x: Tensor, weight: Weight4 | Weight8, bias: Tensor | None, config: GemmConfig, *, bucket: int
) -> Tensor:
    """The small-batch kernel on a tiled weight, `bucket` rows of x per launch."""
    rows, out = x.shape[0], torch.empty(x.shape[0], weight.n, dtype=x.dtype, device=x.device)
    if x.stride(-1) != 1:
        x = x.contiguous()
    schedule = make_schedule(
        weight.n,
        weight.k,
        panel_rows=config.panel_rows,
        step_columns=config.step_columns,
        programs=config.per_multiprocessor * multiprocessors(x.device),
    )
    space = prepare(x.device)
    _check_fits(schedule, config, bucket, space)
    for start in range(0, rows, bucket):
        _launch(x[start : start + bucket], weight, bias, out[start : start + bucket], config, schedule, bucket, space)
    return out


def _check_fits(schedule: Schedule, config: GemmConfig, bucket: int, space: Workspace) -> None:
    need = 2 * schedule.programs * config.panel_rows * bucket
    if need > space.partials.numel() or schedule.panels > PANELS:
        raise ValueError(
            f"partial sums need {4 * need:,} bytes and {schedule.panels:,} counters, the workspace has "
            f"{space.partials.nbytes:,} and {PANELS:,}; lower per_multiprocessor or strips of the configuration"
        )


def _launch(
    x: Tensor,
    weight: Weight4 | Weight8,
    bias: Tensor | None,
    out: Tensor,
    config: GemmConfig,
    schedule: Schedule,
    bucket: int,
    space: Workspace,
) -> None:
    columns = weight.k // TILE_COLUMNS
    even = weight.n % config.panel_rows == 0 and weight.k % config.step_columns == 0
    meta: dict[str, Any] = {"BM": bucket, "STRIPS": config.strips, "BLOCKS": config.blocks, "STAGES": config.stages}
    meta |= {"EVEN": even, "OVERLAP": config.overlap, "PTX": not INTERPRETED, "num_warps": config.strips}
    if config.overlap:
        meta["launch_pdl"] = True
    if config.max_registers is not None:
        meta["maxnreg"] = config.max_registers
    sums = (out, space.partials, space.arrivals)
    sizes = (x.shape[0], weight.n, columns, x.stride(0), schedule.units, schedule.steps)
    if isinstance(weight, Weight4):
        scales = (weight.absmax, *_nested(weight), weight.code)
        gemm.linear_4bit_kernel[(schedule.programs,)](
            x,
            weight.packed,
            *scales,
            bias,
            *sums,
            *sizes,
            weight.offset_rows,
            PER_SCALE=weight.blocksize // TILE_COLUMNS,
            ROUNDED=config.rounded,
            AHEAD=config.ahead,
            **meta,
        )
    else:
        gemm.linear_8bit_kernel[(schedule.programs,)](x, weight.packed, weight.absmax, bias, *sums, *sizes, **meta)


def _nested(weight: Weight4) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    nested = weight.nested
    return (None, None, None) if nested is None else (nested.absmax, nested.code, nested.offset)


def dequantised_product(x: Tensor, weight: Weight4 | Weight8, bias: Tensor | None) -> Tensor:
    """Dequantise into the reused buffer, then cuBLAS."""
    n, k = weight.n, weight.k
    out = torch.empty(x.shape[0], n, dtype=x.dtype, device=x.device)
    buffer = prepare(x.device, max(TILE_ROWS, n) * k * x.element_size()).buffer.view(x.dtype)
    run = buffer.numel() // k // TILE_ROWS * TILE_ROWS
    if run == 0:
        raise ValueError(f"{TILE_ROWS} rows of {k:,} columns do not fit the buffer of {buffer.nbytes:,} bytes")
    for start in range(0, n, run):
        stop = min(n, start + run)
        dense = buffer[: (stop - start) * k].view(stop - start, k)
        dequantise_rows(weight, start, dense)
        if bias is None:
            torch.mm(x, dense.t(), out=out[:, start:stop])
        else:
            torch.addmm(bias[start:stop], x, dense.t(), out=out[:, start:stop])
    return out


def dequantise_rows(weight: Weight4 | Weight8, start: int, out: Tensor) -> None:
    """Rows `start`, a multiple of 16, and on -> out [some rows, k]."""
    count, k = out.shape
    columns = k // TILE_COLUMNS
    grid = (triton.cdiv(count, TILE_ROWS), triton.cdiv(k, 256))
    if isinstance(weight, Weight8):
        if weight.tiled:
            gemm.dequantise_8bit_tiles_kernel[grid](weight.packed, weight.absmax, out, columns, start)
        else:
            rows = slice(start, start + count)
            torch.mul(weight.packed[rows], weight.absmax[rows, None] / 127.0, out=out)
        return
    scales = (weight.absmax, *_nested(weight), weight.code)
    if weight.tiled:
        per_scale = weight.blocksize // TILE_COLUMNS
        gemm.dequantise_4bit_tiles_kernel[grid](
            weight.packed, *scales, out, weight.n, columns, start, weight.offset_rows, PER_SCALE=per_scale
        )
    else:
        flat = (triton.cdiv(count * k, _FLAT_BLOCK),)
        gemm.dequantise_4bit_flat_kernel[flat](
            weight.packed, *scales, out, start * k, (start + count) * k, BLOCKSIZE=weight.blocksize, BLOCK=_FLAT_BLOCK
        )
