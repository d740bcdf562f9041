"""Triton kernels: a few rows of 16-bit activations times a tiled 4-bit or 8-bit weight, and dequantisation.

`out^T = W x^T`: rows of the weight fill the 64 rows of a matrix instruction, so a single row of x wastes little. Units
of work are divided as `schedule.py` says. Scales are float32 and multiply float32 sums.
"""

# mypy: ignore-errors
# Triton compiles these functions: their arguments are its own types.
from __future__ import annotations

import triton
import triton.language as tl

from deployments.engine.kernels.decode import decode_4bit, decode_8bit, fill_pairs

_ANY = ("rows", "columns", "units", "steps")
"""Integers whose values (1, multiples of 16) don't make another kernel."""


@triton.jit
def _finish(
    acc,
    begin,
    first,
    last,
    panel,
    steps,
    units,
    bias,
    out,
    partials,
    arrivals,
    rows,
    n,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Store a panel's sum, or leave this program's part of it and let the last program to arrive add all parts."""
    r = tl.arange(0, BN)
    m = tl.arange(0, BM)
    column = panel * BN + r
    inside = (column < n)[:, None] & (m < rows)[None, :]
    target = out + m[None, :].to(tl.int64) * n + column[:, None]
    within = r[:, None] * BM + m[None, :]
    if bias is not None:  # noqa: SIM108 - a constexpr branch: only one side is compiled
        shift = tl.load(bias + column, mask=column < n, other=0.0).to(tl.float32)[:, None]
    else:
        shift = 0.0
    if (first == 0) & (last == steps):
        tl.store(target, (acc + shift).to(out.dtype.element_ty), mask=inside)
    else:
        program = tl.program_id(0)
        programs = tl.num_programs(0)
        slot = 2 * program + (begin < panel * steps).to(tl.int32)
        tl.store(partials + slot.to(tl.int64) * (BN * BM) + within, acc)
        tl.debug_barrier()
        from_program = ((panel * steps + 1) * programs - 1) // units
        to_program = ((panel + 1) * steps * programs - 1) // units
        if tl.atomic_add(arrivals + panel, 1, sem="acq_rel") == to_program - from_program:
            total = tl.zeros((BN, BM), dtype=tl.float32)
            for other in range(from_program, to_program + 1):
                other_slot = 2 * other + (other * units // programs < panel * steps).to(tl.int32)
                part = partials + other_slot.to(tl.int64) * (BN * BM) + within
                total += tl.load(part, cache_modifier=".cg")
            tl.store(target, (total + shift).to(out.dtype.element_ty), mask=inside)
            tl.store(arrivals + panel, 0)


@triton.jit
def _scales(absmax, nested_absmax, nested_code, offset, block, blocks, row, n, live):
    """float32 scales of one block column for the rows `row`; `live`: which to read."""
    if nested_absmax is None:
        scale = tl.load(absmax + block * n + row, mask=live, other=0.0)
    else:
        code = tl.load(absmax + block * n + row, mask=live, other=0).to(tl.int32)
        outer = tl.load(nested_absmax + (row * blocks + block) // 256, mask=live, other=0.0)
        scale = tl.load(nested_code + code) * outer + tl.load(offset)
    return scale


@triton.jit(do_not_specialize=_ANY)
def linear_4bit_kernel(
    x,  # [rows, k]
    tiles,  # int32 [n/16, k/64, 128]
    absmax,  # float32, or uint8 where nested: [k/blocksize, n]
    nested_absmax,  # float32 [blocks/256], or None
    nested_code,  # float32 [256], or None
    offset,  # float32 [1], or None
    code,  # float32 [16]
    bias,  # [n], or None
    out,  # [rows, n]
    partials,  # float32 [2 * programs, BN, BM]
    arrivals,  # int32 [panels], zero before and after
    rows,
    n,
    columns,  # k / 64
    stride,  # elements between rows of x
    units,  # schedule.units
    steps,  # schedule.steps
    PER_SCALE: tl.constexpr,  # blocksize / 64
    BM: tl.constexpr,
    STRIPS: tl.constexpr,
    BLOCKS: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN: tl.constexpr,  # n fills its panels and k its steps: nothing to mask
    PTX: tl.constexpr,
):
    BN: tl.constexpr = 16 * STRIPS
    dtype: tl.constexpr = x.dtype.element_ty
    lane = fill_pairs(code, dtype, PTX)
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    begin = program * units // programs
    end = (program + 1) * units // programs
    m = tl.arange(0, BM)
    x_at = x + m[:, None].to(tl.int64) * stride + tl.arange(0, 64)[None, :]
    for panel in range(begin // steps, (end - 1) // steps + 1):
        first = tl.maximum(begin - panel * steps, 0)
        last = tl.minimum(end - panel * steps, steps)
        row = panel * BN + tl.arange(0, BN)
        strip = panel * STRIPS + tl.arange(0, STRIPS)
        tile_at = tiles + strip[:, None].to(tl.int64) * (columns * 128) + tl.arange(0, 128)[None, :]
        acc = tl.zeros((BN, BM), dtype=tl.float32)
        for step in tl.range(first, last, num_stages=STAGES):
            for b in tl.static_range(BLOCKS):
                column = step * BLOCKS + b
                if EVEN:
                    words = tl.load(tile_at + column * 128)
                    live = tl.full((BN,), True, tl.int1)
                    xs = tl.load(x_at + column * 64, mask=(m < rows)[:, None], other=0.0)
                else:
                    inside = column < columns
                    live = (row < n) & inside
                    words = tl.load(tile_at + column * 128, mask=(strip < n // 16)[:, None] & inside, other=0)
                    xs = tl.load(x_at + column * 64, mask=(m < rows)[:, None] & inside, other=0.0)
                scale = _scales(
                    absmax, nested_absmax, nested_code, offset, column // PER_SCALE, columns // PER_SCALE, row, n, live
                )
                weight = decode_4bit(words, lane, code, dtype, STRIPS, PTX)
                acc += tl.dot(weight, tl.trans(xs)) * scale[:, None]
        _finish(acc, begin, first, last, panel, steps, units, bias, out, partials, arrivals, rows, n, BM, BN)


@triton.jit(do_not_specialize=_ANY)
def linear_8bit_kernel(
    x,  # [rows, k]
    tiles,  # int32 [n/16, k/64, 256]
    scales,  # float32 [n]: the absolute maximum of each row
    bias,  # [n], or None
    out,  # [rows, n]
    partials,  # float32 [2 * programs, BN, BM]
    arrivals,  # int32 [panels], zero before and after
    rows,
    n,
    columns,  # k / 64
    stride,  # elements between rows of x
    units,  # schedule.units
    steps,  # schedule.steps
    BM: tl.constexpr,
    STRIPS: tl.constexpr,
    BLOCKS: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN: tl.constexpr,  # n fills its panels and k its steps: nothing to mask
    PTX: tl.constexpr,
):
    BN: tl.constexpr = 16 * STRIPS
    dtype: tl.constexpr = x.dtype.element_ty
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    begin = program * units // programs
    end = (program + 1) * units // programs
    m = tl.arange(0, BM)
    x_at = x + m[:, None].to(tl.int64) * stride + tl.arange(0, 64)[None, :]
    for panel in range(begin // steps, (end - 1) // steps + 1):
        first = tl.maximum(begin - panel * steps, 0)
        last = tl.minimum(end - panel * steps, steps)
        row = panel * BN + tl.arange(0, BN)
        half_strip = tl.arange(0, 2 * STRIPS)
        strip = panel * STRIPS + half_strip % STRIPS
        half = half_strip // STRIPS
        tile_at = tiles + (strip.to(tl.int64) * (columns * 256) + half * 128)[:, None] + tl.arange(0, 128)[None, :]
        acc = tl.zeros((BN, BM), dtype=tl.float32)
        for step in tl.range(first, last, num_stages=STAGES):
            for b in tl.static_range(BLOCKS):
                column = step * BLOCKS + b
                if EVEN:
                    words = tl.load(tile_at + column * 256)
                    xs = tl.load(x_at + column * 64, mask=(m < rows)[:, None], other=0.0)
                else:
                    inside = column < columns
                    words = tl.load(tile_at + column * 256, mask=(strip < n // 16)[:, None] & inside, other=0)
                    xs = tl.load(x_at + column * 64, mask=(m < rows)[:, None] & inside, other=0.0)
                acc = tl.dot(decode_8bit(words, dtype, STRIPS, PTX), tl.trans(xs), acc)
        acc *= (tl.load(scales + row, mask=row < n, other=0.0) / 127.0)[:, None]
        _finish(acc, begin, first, last, panel, steps, units, bias, out, partials, arrivals, rows, n, BM, BN)


@triton.jit
def dequantise_4bit_tiles_kernel(
    tiles, absmax, nested_absmax, nested_code, offset, code, out, n, columns, row0, PER_SCALE: tl.constexpr
):
    """A 16-row strip by 256 columns of a tiled weight -> out [.., 64 * columns], whose first row is row0."""
    strip = row0 // 16 + tl.program_id(0)
    byte = tl.program_id(1) * 128 + tl.arange(0, 128)  # along a row: columns 2 * byte and 2 * byte + 1
    live = byte < 32 * columns
    local = tl.arange(0, 16)
    column, q, c = byte // 32, byte % 32 // 4, byte % 4
    where = (column * 512 + c * 16 + q)[None, :] + (local % 8 * 64 + local // 8 * 8)[:, None]
    packed = tl.load(
        tiles.to(tl.pointer_type(tl.uint8)) + strip.to(tl.int64) * columns * 512 + where, mask=live[None, :]
    )
    packed = packed.to(tl.int32)
    row = strip * 16 + local
    scale = _scales(
        absmax, nested_absmax, nested_code, offset,
        (column // PER_SCALE)[None, :], columns // PER_SCALE, row[:, None], n, live[None, :] & (row < n)[:, None],
    )  # fmt: skip
    both = tl.join(tl.load(code + (packed >> 4)) * scale, tl.load(code + (packed & 15)) * scale)
    target = (
        out
        + (row - row0)[:, None].to(tl.int64) * (64 * columns)
        + (tl.program_id(1) * 256 + tl.arange(0, 256))[None, :]
    )
    inside = (tl.program_id(1) * 256 + tl.arange(0, 256) < 64 * columns)[None, :]
    tl.store(target, tl.reshape(both, (16, 256)).to(out.dtype.element_ty), mask=inside)


@triton.jit
def dequantise_8bit_tiles_kernel(tiles, scales, out, columns, row0):
    """The same for 8 bits."""
    strip = row0 // 16 + tl.program_id(0)
    k = tl.program_id(1) * 256 + tl.arange(0, 256)
    live = (k < 64 * columns)[None, :]
    local = tl.arange(0, 16)
    q, c, j = k % 64 // 8, k % 8 // 2, k % 2
    p, u, i = q // 4, q % 4 // 2, q % 2
    where = (k // 64 * 1024 + p * 512 + c * 16 + u * 4 + j * 2 + i)[None, :] + (local % 8 * 64 + local // 8 * 8)[
        :, None
    ]
    value = tl.load(tiles.to(tl.pointer_type(tl.int8)) + strip.to(tl.int64) * columns * 1024 + where, mask=live)
    scale = tl.load(scales + strip * 16 + local) / 127.0
    target = out + (strip * 16 + local - row0)[:, None].to(tl.int64) * (64 * columns) + k[None, :]
    tl.store(target, (value.to(tl.float32) * scale[:, None]).to(out.dtype.element_ty), mask=live)


@triton.jit
def dequantise_4bit_flat_kernel(
    packed,
    absmax,
    nested_absmax,
    nested_code,
    offset,
    code,
    out,
    start,
    stop,
    BLOCKSIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Weights [start, stop) of a weight in bitsandbytes' own order -> out, 1-D."""
    at = start + tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < stop
    byte = tl.load(packed + at // 2, mask=live, other=0).to(tl.int32)
    nibble = tl.where(at % 2 == 0, byte >> 4, byte & 15)
    block = at // BLOCKSIZE
    scale = _scales(absmax, nested_absmax, nested_code, offset, 0, 1, block, 1, live)
    tl.store(out + at - start, (tl.load(code + nibble) * scale).to(out.dtype.element_ty), mask=live)
