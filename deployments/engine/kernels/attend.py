"""The Triton kernel for decodes: writes their keys and values and attends over the blocks."""

# mypy: ignore-errors
# Triton compiles these functions: their arguments are its own types.
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_ANY = ("rows", "items")
"""Integers whose values (1, multiples of 16) don't make another kernel."""


@triton.jit
def _tile(blocks, page, position, d, live, kv_head, kv_heads, BLOCK_SIZE: tl.constexpr, D: tl.constexpr):
    """Keys or values of one head at some positions of a sequence, [TILE, D]; zeros where not live."""
    at = ((page * BLOCK_SIZE + position % BLOCK_SIZE) * kv_heads + kv_head) * D
    return tl.load(blocks + at[:, None] + d[None, :], mask=live[:, None], other=0.0)


@triton.jit
def _fold(q, k, v, live, total, weight, top, scale):
    """Some keys and values into the sums so far: the weighted values, the weights, and the largest score."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    scores = tl.where(live[None, :], scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1))
    shrunk = tl.exp2(top - higher)
    weights = tl.exp2(scores - higher[:, None])
    total = total * shrunk[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    return total, weight * shrunk + tl.sum(weights, 1), higher


@triton.jit
def _write(keys, values, pages, newest, new_k, new_v, kv_head, kv_heads, BLOCK_SIZE: tl.constexpr, D: tl.constexpr):
    """A sequence's newest key and value, [D] each, in its block."""
    d = tl.arange(0, D)
    page = tl.load(pages + newest // BLOCK_SIZE).to(tl.int64)
    place = ((page * BLOCK_SIZE + newest % BLOCK_SIZE) * kv_heads + kv_head) * D
    tl.store(keys + place + d, new_k)
    tl.store(values + place + d, new_v)


@triton.jit
def _keep(sums, weights, tops, part, total, weight, top, GROUP: tl.constexpr, D: tl.constexpr):
    """A split's sums in memory, for whoever merges them."""
    d = tl.arange(0, D)
    head = tl.arange(0, 16)
    at = part * GROUP + head
    tl.store(sums + at[:, None] * D + d[None, :], total, mask=(head < GROUP)[:, None])
    tl.store(weights + at, weight, mask=head < GROUP)
    tl.store(tops + at, top, mask=head < GROUP)
    tl.debug_barrier()  # every thread's part is stored before one of them announces it


@triton.jit
def _merge(sums, weights, tops, first, parts, HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr):
    """The parts of a KV head's query heads as one result, [HEADS, D]; several are read at a time, in order."""
    AT_ONCE: tl.constexpr = max(2, 32 // HEADS)
    d = tl.arange(0, D)
    head = tl.arange(0, HEADS)
    total = tl.zeros((HEADS, D), tl.float32)
    weight = tl.zeros((HEADS,), tl.float32)
    top = tl.full((HEADS,), float("-inf"), tl.float32)
    for begin in range(0, parts, AT_ONCE):
        index = begin + tl.arange(0, AT_ONCE)
        there = (index < parts)[:, None] & (head < GROUP)[None, :]
        at = (first + index)[:, None] * GROUP + head[None, :]
        own_top = tl.load(tops + at, mask=there, other=-1e30, cache_modifier=".cg")
        own_weight = tl.load(weights + at, mask=there, other=0.0, cache_modifier=".cg")
        own = tl.load(
            sums + at[:, :, None] * D + d[None, None, :], mask=there[:, :, None], other=0.0, cache_modifier=".cg"
        )
        higher = tl.maximum(top, tl.max(own_top, 0))
        shrunk = tl.exp2(top - higher)
        share = tl.exp2(own_top - higher[None, :])
        weight = weight * shrunk + tl.sum(own_weight * share, 0)
        total = total * shrunk[:, None] + tl.sum(own * share[:, :, None], 0)
        top = higher
    return total / tl.where(head < GROUP, weight, 1.0)[:, None]


@triton.jit(do_not_specialize=_ANY)
def attend_kernel(
    query,  # [rows or more, heads, D]; a row of each sequence
    key,  # [rows, kv_heads, D], like value: of the rows, not yet in the blocks
    value,
    keys,  # [blocks, BLOCK_SIZE, kv_heads, D], like values
    values,
    out,  # [rows, heads, D]
    page_starts,  # int32 [rows + 1]
    pages,  # int32: the sequences' blocks, one sequence behind the other
    lengths,  # int32 [rows]: tokens of each sequence, its row included
    split_starts,  # int32 [rows + 1]: first split of each sequence, and the number of splits
    split_tokens,  # int32 [1]: tokens of a split
    sums,  # float32 [kv_heads * items, GROUP, D]
    weights,  # float32 [kv_heads * items, GROUP], like tops
    tops,
    arrivals,  # int32 [rows * kv_heads], zero before and after
    scale,  # of scores, times log2(e)
    query_row,  # elements between rows, and between heads
    query_head,
    key_row,
    key_head,
    value_row,
    value_head,
    rows,
    items,  # splits, of all sequences, that there are programs for
    GROUP: tl.constexpr,  # query heads per KV head
    HEADS: tl.constexpr,  # a power of two, GROUP at least
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,  # keys that are taken at once
    STAGES: tl.constexpr,  # tiles on their way
    ROWS: tl.constexpr,  # a power of four, rows at least
    OVERLAP: tl.constexpr,  # begin while the kernel before ends
):
    kv_head, item = tl.program_id(0), tl.program_id(1)
    kv_heads = tl.num_programs(0)
    # A step's tables, and what was written by the steps before it, do not depend on the kernel before this one.
    index = tl.arange(0, ROWS)
    ends = tl.load(split_starts + 1 + index, mask=index < rows, other=2**31 - 1)
    row = tl.sum((ends <= item).to(tl.int32), 0)
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    if row < rows:
        first = tl.load(split_starts + row)
        splits = tl.load(split_starts + row + 1) - first
        share = tl.load(split_tokens)
        newest = tl.load(lengths + row) - 1
        pages += tl.load(page_starts + row)
        split = item - first
        d = tl.arange(0, D)
        head = tl.arange(0, 16)
        live = head < GROUP
        heads = kv_head * GROUP + head
        q = tl.load(query + row * query_row + heads[:, None] * query_head + d[None, :], mask=live[:, None], other=0.0)
        total = tl.zeros((16, D), tl.float32)
        weight = tl.zeros((16,), tl.float32)
        top = tl.full((16,), float("-inf"), tl.float32)
        if split == splits - 1:
            new_k = tl.load(key + row * key_row + kv_head * key_head + d)
            new_v = tl.load(value + row * value_row + kv_head * value_head + d)
            _write(keys, values, pages, newest, new_k, new_v, kv_head, kv_heads, BLOCK_SIZE, D)
            top = tl.sum(q.to(tl.float32) * new_k.to(tl.float32)[None, :], 1) * scale
            weight += 1.0
            total += new_v.to(tl.float32)[None, :]
        end = tl.minimum(split * share + share, newest)
        for start in tl.range(split * share, end, TILE, num_stages=STAGES):
            position = start + tl.arange(0, TILE)
            there = position < end
            page = tl.load(pages + position // BLOCK_SIZE, mask=there, other=0).to(tl.int64)
            k = _tile(keys, page, position, d, there, kv_head, kv_heads, BLOCK_SIZE, D)
            v = _tile(values, page, position, d, there, kv_head, kv_heads, BLOCK_SIZE, D)
            total, weight, top = _fold(q, k, v, there, total, weight, top, scale)
        if splits == 1:
            whole = out + (row * kv_heads * GROUP + heads[:, None]) * D + d[None, :]
            tl.store(whole, (total / weight[:, None]).to(out.dtype.element_ty), mask=live[:, None])
        else:
            first += kv_head * items
            _keep(sums, weights, tops, first + split, total, weight, top, GROUP, D)
            if tl.atomic_add(arrivals + row * kv_heads + kv_head, 1, sem="acq_rel") == splits - 1:
                merged = _merge(sums, weights, tops, first, splits, HEADS, GROUP, D)
                mine = tl.arange(0, HEADS)
                target = out + ((row * kv_heads + kv_head) * GROUP + mine[:, None]) * D + d[None, :]
                tl.store(target, merged.to(out.dtype.element_ty), mask=(mine < GROUP)[:, None])
                tl.store(arrivals + row * kv_heads + kv_head, 0)
