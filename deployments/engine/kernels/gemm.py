"""Triton kernels: a few rows of 16-bit activations times a tiled 4-bit or 8-bit weight, and dequantisation.

`out^T = W x^T`: rows of the weight fill the 64 rows of a matrix instruction, so a single row of x wastes little. Units
of work are divided as `schedule.py` says. Scales are float32 and multiply float32 sums.
"""

# mypy: ignore-errors
# Triton compiles these functions: their arguments are its own types.
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from deployments.engine.kernels.decode import decode_4bit, decode_8bit, fill_pairs

_ANY = ("rows", "columns", "units", "steps", "offset_rows")
"""Integers whose values (1, multiples of 16) don't make another kernel."""


@triton.jit
def _vector(scalar):
    """A scalar as int32 [1]. Comparisons of two scalars are no masks for the interpreter of Triton 3.9."""
    return tl.full((1,), scalar, tl.int32)


@triton.jit
def _write(acc, panel, bias, out, rows, n, BM: tl.constexpr, BN: tl.constexpr):
    """A panel's whole sum [BN, BM], and the bias, to `out`."""
    m = tl.arange(0, BM)
    column = panel * BN + tl.arange(0, BN)
    if bias is not None:
        acc += tl.load(bias + column, mask=column < n, other=0.0).to(tl.float32)[:, None]
    target = out + m[None, :].to(tl.int64) * n + column[:, None]
    tl.store(target, acc.to(out.dtype.element_ty), mask=(column < n)[:, None] & (m < rows)[None, :])


@triton.jit
def _part_of(program, begin, panel, steps, partials, BM: tl.constexpr, BN: tl.constexpr):
    """Where a program, whose span starts at `begin`, leaves its part of a panel: `Schedule.slot`."""
    slot = 2 * program + (begin < panel * steps).to(tl.int32)
    return partials + slot.to(tl.int64) * (BN * BM) + tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]


@triton.jit
def _put(acc, begin, first, last, panel, steps, bias, out, partials, rows, n, BM: tl.constexpr, BN: tl.constexpr):
    """Write a panel that this program computed whole; leave a part for `_settle_all`."""
    if (first == 0) & (last == steps):
        _write(acc, panel, bias, out, rows, n, BM, BN)
    else:
        tl.store(_part_of(tl.program_id(0), begin, panel, steps, partials, BM, BN), acc)


@triton.jit
def _settle(panel, steps, units, bias, out, partials, arrivals, rows, n, BM: tl.constexpr, BN: tl.constexpr):
    """Announce this program's part of a panel; the last program to do so adds all parts, in the order of the columns.

    Several parts are read at a time, so that the way through memory is paid once for all of them."""
    programs = tl.num_programs(0)
    first = ((panel * steps + 1) * programs - 1) // units
    last = ((panel + 1) * steps * programs - 1) // units
    if tl.atomic_add(arrivals + panel, 1, sem="acq_rel") == last - first:
        total = tl.zeros((BN, BM), dtype=tl.float32)
        AT_ONCE: tl.constexpr = max(2, 128 // BM)
        for group in range(first, last + 1, AT_ONCE):
            for i in tl.static_range(AT_ONCE):
                program = group + i
                part = _part_of(program, program * units // programs, panel, steps, partials, BM, BN)
                total += tl.load(part, mask=_vector(program) <= last, other=0.0, cache_modifier=".cg")
        _write(total, panel, bias, out, rows, n, BM, BN)
        tl.store(arrivals + panel, 0)


@triton.jit
def _settle_all(begin, end, steps, units, bias, out, partials, arrivals, rows, n, BM: tl.constexpr, BN: tl.constexpr):
    """The parts that a program left: of the panel that its span begins in, and of the one that it ends in."""
    tl.debug_barrier()  # every thread's part is stored before one of them announces it
    head = begin // steps
    tail = (end - 1) // steps
    if (begin > head * steps) | (end < (head + 1) * steps):
        _settle(head, steps, units, bias, out, partials, arrivals, rows, n, BM, BN)
    if (tail > head) & (end < (tail + 1) * steps):
        _settle(tail, steps, units, bias, out, partials, arrivals, rows, n, BM, BN)


@triton.jit
def _scales(absmax, nested_absmax, nested_code, shift, block, blocks, row, n, live):
    """float32 scales of one block column for the rows `row`; `shift`: their offsets; `live`: which to read."""
    if nested_absmax is None:
        scale = tl.load(absmax + block * n + row, mask=live, other=0.0)
    else:
        code = tl.load(absmax + block * n + row, mask=live, other=0).to(tl.int32)
        outer = tl.load(nested_absmax + (row * blocks + block) // 256, mask=live, other=0.0)
        scale = tl.load(nested_code + code) * outer + shift
    return scale


@triton.jit
def _load_block(tiles, panel, column, columns, n, STRIPS: tl.constexpr, WORDS: tl.constexpr, EVEN: tl.constexpr):
    """The tiles of a panel in one block column, int32: [STRIPS, 128], or all first halves and then the second ones of
    tiles of 256 words, [2 * STRIPS, 128]. A warp reads the 512 bytes of a row."""
    HALVES: tl.constexpr = WORDS // 128
    part = tl.arange(0, HALVES * STRIPS)
    strip = panel * STRIPS + part % STRIPS
    start = strip.to(tl.int64) * (columns * WORDS) + part // STRIPS * 128 + column * WORDS
    at = tiles + start[:, None] + tl.arange(0, 128)[None, :]
    if EVEN:  # noqa: SIM108 - a constexpr branch: only one side is compiled
        words = tl.load(at)
    else:
        words = tl.load(at, mask=(strip < n // 16)[:, None] & (_vector(column) < columns), other=0)
    return words


@triton.jit
def _load_step(tiles, panel, step, columns, n, STRIPS: tl.constexpr, BLOCKS: tl.constexpr, EVEN: tl.constexpr):
    """The 4-bit tiles of a panel in one step, int32 [BLOCKS * STRIPS, 128], straight to registers."""
    part = tl.arange(0, BLOCKS * STRIPS)
    strip = panel * STRIPS + part % STRIPS
    column = step * BLOCKS + part // STRIPS
    at = tiles + (strip.to(tl.int64) * (columns * 128) + column * 128)[:, None] + tl.arange(0, 128)[None, :]
    if EVEN:
        words = tl.load(at, eviction_policy="evict_first")
    else:
        inside = (strip < n // 16) & (column < columns)
        words = tl.load(at, mask=inside[:, None], other=0, eviction_policy="evict_first")
    return words


@triton.jit
def _pick_block(words, b: tl.constexpr, STRIPS: tl.constexpr, BLOCKS: tl.constexpr):
    """Block b of a step: a choice of registers."""
    words = tl.permute(tl.reshape(words, (BLOCKS, STRIPS, 128)), (1, 2, 0))
    if BLOCKS == 4:
        even, odd = tl.split(tl.reshape(words, (STRIPS, 128, 2, 2)))
        words = even if b % 2 == 0 else odd
    if BLOCKS == 1:
        block = tl.reshape(words, (STRIPS, 128))
    else:
        low, high = tl.split(words)
        block = low if b // (BLOCKS // 2) == 0 else high
    return block


@triton.jit
def _begin(units, OVERLAP: tl.constexpr):
    """This program's span of the units of work, once the kernel before has written what this one reads."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    program = tl.program_id(0)
    return program * units // tl.num_programs(0), (program + 1) * units // tl.num_programs(0)


@triton.jit
def _activations(x_at, column, columns, m, rows, EVEN: tl.constexpr):
    """x in one block column, [BM, 64]."""
    inside = (m < rows)[:, None] if EVEN else (m < rows)[:, None] & (_vector(column) < columns)
    return tl.load(x_at + column * 64, mask=inside, other=0.0)


@triton.jit
def _live(row, n, column, columns, BN: tl.constexpr, EVEN: tl.constexpr):
    """Which rows of a panel are the weight's, [BN]."""
    return tl.full((BN,), True, tl.int1) if EVEN else (row < n) & (_vector(column) < columns)


@triton.jit(do_not_specialize=_ANY)
def linear_4bit_kernel(
    x,  # [rows, k]
    tiles,  # int32 [n/16, k/64, 128]
    absmax,  # float32, or uint8 where nested: [k/blocksize, n]
    nested_absmax,  # float32 [blocks/256], or None
    nested_code,  # float32 [256], or None
    offset,  # float32 [n/offset_rows], or None
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
    offset_rows,  # rows of the weight that share an offset
    PER_SCALE: tl.constexpr,  # blocksize / 64
    BM: tl.constexpr,
    STRIPS: tl.constexpr,
    BLOCKS: tl.constexpr,
    STAGES: tl.constexpr,
    ROUNDED: tl.constexpr,  # scale 16-bit weights before the product, not float32 sums after it
    AHEAD: tl.constexpr,  # weights of the next step wait in registers, not in shared memory
    EVEN: tl.constexpr,  # n fills its panels and k its steps: nothing to mask
    OVERLAP: tl.constexpr,  # begin while the kernel before ends
    PTX: tl.constexpr,
):
    BN: tl.constexpr = 16 * STRIPS
    dtype: tl.constexpr = x.dtype.element_ty
    lane = fill_pairs(code, dtype, PTX)
    begin, end = _begin(units, OVERLAP)
    m = tl.arange(0, BM)
    x_at = x + m[:, None].to(tl.int64) * stride + tl.arange(0, 64)[None, :]
    for panel in range(begin // steps, (end - 1) // steps + 1):
        first = tl.maximum(begin - panel * steps, 0)
        last = tl.minimum(end - panel * steps, steps)
        row = panel * BN + tl.arange(0, BN)
        shift = None if offset is None else tl.load(offset + row // offset_rows, mask=row < n, other=0.0)
        acc = tl.zeros((BN, BM), dtype=tl.float32)
        if AHEAD:
            ahead = _load_step(tiles, panel, first, columns, n, STRIPS, BLOCKS, EVEN)
        for step in tl.range(first, last, num_stages=STAGES):
            if AHEAD:
                words_of_step = ahead
                ahead = _load_step(tiles, panel, tl.minimum(step + 1, last - 1), columns, n, STRIPS, BLOCKS, EVEN)
            for b in tl.static_range(BLOCKS):
                column = step * BLOCKS + b
                xs = _activations(x_at, column, columns, m, rows, EVEN)
                live = _live(row, n, column, columns, BN, EVEN)
                if AHEAD:
                    words = _pick_block(words_of_step, b, STRIPS, BLOCKS)
                else:
                    words = _load_block(tiles, panel, column, columns, n, STRIPS, 128, EVEN)
                scale = _scales(
                    absmax, nested_absmax, nested_code, shift, column // PER_SCALE, columns // PER_SCALE, row, n, live
                )
                if ROUNDED:
                    acc = tl.dot(decode_4bit(words, lane, code, scale, dtype, STRIPS, PTX), tl.trans(xs), acc)
                else:
                    weight = decode_4bit(words, lane, code, None, dtype, STRIPS, PTX)
                    acc += tl.dot(weight, tl.trans(xs)) * scale[:, None]
        _put(acc, begin, first, last, panel, steps, bias, out, partials, rows, n, BM, BN)
    _settle_all(begin, end, steps, units, bias, out, partials, arrivals, rows, n, BM, BN)


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
    EVEN: tl.constexpr,
    OVERLAP: tl.constexpr,
    PTX: tl.constexpr,
):
    BN: tl.constexpr = 16 * STRIPS
    dtype: tl.constexpr = x.dtype.element_ty
    begin, end = _begin(units, OVERLAP)
    m = tl.arange(0, BM)
    x_at = x + m[:, None].to(tl.int64) * stride + tl.arange(0, 64)[None, :]
    for panel in range(begin // steps, (end - 1) // steps + 1):
        first = tl.maximum(begin - panel * steps, 0)
        last = tl.minimum(end - panel * steps, steps)
        row = panel * BN + tl.arange(0, BN)
        acc = tl.zeros((BN, BM), dtype=tl.float32)
        for step in tl.range(first, last, num_stages=STAGES):
            for b in tl.static_range(BLOCKS):
                column = step * BLOCKS + b
                xs = _activations(x_at, column, columns, m, rows, EVEN)
                words = _load_block(tiles, panel, column, columns, n, STRIPS, 256, EVEN)
                acc = tl.dot(decode_8bit(words, dtype, STRIPS, PTX), tl.trans(xs), acc)
        acc *= (tl.load(scales + row, mask=row < n, other=0.0) / 127.0)[:, None]
        _put(acc, begin, first, last, panel, steps, bias, out, partials, rows, n, BM, BN)
    _settle_all(begin, end, steps, units, bias, out, partials, arrivals, rows, n, BM, BN)


@triton.jit
def dequantise_4bit_tiles_kernel(
    tiles, absmax, nested_absmax, nested_code, offset, code, out, n, columns, row0, offset_rows, PER_SCALE: tl.constexpr
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
    shift = None if offset is None else tl.load(offset + strip * 16 // offset_rows)
    scale = _scales(
        absmax, nested_absmax, nested_code, shift,
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
    shift = None if offset is None else tl.load(offset)
    scale = _scales(absmax, nested_absmax, nested_code, shift, 0, 1, block, 1, live)
    tl.store(out + at - start, (tl.load(code + nibble) * scale).to(out.dtype.element_ty), mask=live)
