"""The Triton kernel for decodes of few sequences: writes their keys and values and attends over the blocks."""

# mypy: ignore-errors
# Triton compiles these functions: their arguments are its own types.
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_ANY = ("splits",)
"""Integers whose values (1, multiples of 16) don't make another kernel."""


@triton.jit
def _tile(blocks, pages, position, d, live, kv_head, kv_heads, BLOCK_SIZE: tl.constexpr, D: tl.constexpr):
    """Keys or values of one head at some positions of a sequence, [TILE, D]; zeros where not live."""
    page = tl.load(pages + position // BLOCK_SIZE, mask=live, other=0).to(tl.int64)
    at = ((page * BLOCK_SIZE + position % BLOCK_SIZE) * kv_heads + kv_head) * D
    return tl.load(blocks + at[:, None] + d[None, :], mask=live[:, None], other=0.0)


@triton.jit
def _fold(q, k, v, position, end, total, weight, top, scale):
    """Some keys and values into the sums so far: the weighted values, the weights, and the largest score."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    scores = tl.where((position < end)[None, :], scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1))
    shrunk = tl.exp2(top - higher)
    weights = tl.exp2(scores - higher[:, None])
    total = total * shrunk[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    return total, weight * shrunk + tl.sum(weights, 1), higher


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
    query,  # [rows, heads, D]; a row of each sequence
    key,  # [rows, kv_heads, D], like value: of the rows, not yet in the blocks
    value,
    keys,  # [blocks, BLOCK_SIZE, kv_heads, D], like values
    values,
    out,  # [rows, heads, D]
    page_starts,  # int32 [rows + 1]
    pages,  # int32: the sequences' blocks, one sequence behind the other
    lengths,  # int32 [rows]: tokens of each sequence, its row included
    sums,  # float32 [rows * kv_heads * splits, GROUP, D]
    weights,  # float32 [rows * kv_heads * splits, GROUP], like tops
    tops,
    arrivals,  # int32 [rows * kv_heads], zero before and after
    scale,  # of scores, times log2(e)
    query_row,  # elements between rows, and between heads
    query_head,
    key_row,
    key_head,
    value_row,
    value_head,
    splits,  # programs that share a sequence's keys
    GROUP: tl.constexpr,  # query heads per KV head
    HEADS: tl.constexpr,  # a power of two, GROUP at least
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,  # keys that are taken at once
    OVERLAP: tl.constexpr,  # begin while the kernel before ends
):
    split, kv_head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_heads = tl.num_programs(1)
    # A step's tables, and what was written by the steps before it, do not depend on the kernel before this one.
    length = tl.load(lengths + row)
    pages += tl.load(page_starts + row)
    share = tl.cdiv(tl.cdiv(length, TILE), splits) * TILE
    begin = split * share
    end = tl.minimum(begin + share, length)
    newest = length - 1
    d = tl.arange(0, D)
    position = begin + tl.arange(0, TILE)
    k = _tile(keys, pages, position, d, position < tl.minimum(end, newest), kv_head, kv_heads, BLOCK_SIZE, D)
    v = _tile(values, pages, position, d, position < tl.minimum(end, newest), kv_head, kv_heads, BLOCK_SIZE, D)
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    if begin < end:
        head = tl.arange(0, 16)
        live = head < GROUP
        heads = kv_head * GROUP + head
        q = tl.load(query + row * query_row + heads[:, None] * query_head + d[None, :], mask=live[:, None], other=0.0)
        new_k = tl.load(key + row * key_row + kv_head * key_head + d)
        new_v = tl.load(value + row * value_row + kv_head * value_head + d)
        if end == length:
            page = tl.load(pages + newest // BLOCK_SIZE).to(tl.int64)
            place = ((page * BLOCK_SIZE + newest % BLOCK_SIZE) * kv_heads + kv_head) * D
            tl.store(keys + place + d, new_k)
            tl.store(values + place + d, new_v)
        total = tl.zeros((16, D), tl.float32)
        weight = tl.zeros((16,), tl.float32)
        top = tl.full((16,), float("-inf"), tl.float32)
        for start in range(begin, end, TILE):
            position = start + tl.arange(0, TILE)
            k = tl.where((position == newest)[:, None], new_k[None, :], k)
            v = tl.where((position == newest)[:, None], new_v[None, :], v)
            ahead = position + TILE
            there = ahead < tl.minimum(end, newest)
            next_k = _tile(keys, pages, ahead, d, there, kv_head, kv_heads, BLOCK_SIZE, D)
            next_v = _tile(values, pages, ahead, d, there, kv_head, kv_heads, BLOCK_SIZE, D)
            total, weight, top = _fold(q, k, v, position, end, total, weight, top, scale)
            k = next_k
            v = next_v
        parts = tl.cdiv(length, share)
        first = (row * kv_heads + kv_head) * splits
        if parts == 1:
            whole = out + (row * kv_heads * GROUP + heads[:, None]) * D + d[None, :]
            tl.store(whole, (total / weight[:, None]).to(out.dtype.element_ty), mask=live[:, None])
        else:
            at = (first + split) * GROUP + head
            tl.store(sums + at[:, None] * D + d[None, :], total, mask=live[:, None])
            tl.store(weights + at, weight, mask=live)
            tl.store(tops + at, top, mask=live)
            tl.debug_barrier()  # every thread's part is stored before one of them announces it
            if tl.atomic_add(arrivals + row * kv_heads + kv_head, 1, sem="acq_rel") == parts - 1:
                merged = _merge(sums, weights, tops, first, parts, HEADS, GROUP, D)
                mine = tl.arange(0, HEADS)
                target = out + ((row * kv_heads + kv_head) * GROUP + mine[:, None]) * D + d[None, :]
                tl.store(target, merged.to(out.dtype.element_ty), mask=(mine < GROUP)[:, None])
                tl.store(arrivals + row * kv_heads + kv_head, 0)
