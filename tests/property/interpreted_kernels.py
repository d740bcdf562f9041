"""Run by test_kernels.py under TRITON_INTERPRET=1: the Triton kernels on the CPU against float64.

In float16: the interpreter keeps bfloat16 as raw integers in dot products.
"""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor, nn

from deployments.engine import attention_decodes
from deployments.engine.attention import RowSpan
from deployments.engine.attention_tables import Tables, pack
from deployments.engine.flashinfer_fit import Kind
from deployments.engine.kernels import launch
from deployments.engine.kernels.config import GemmConfig
from deployments.engine.kernels.fuse import Part, fuse_linears
from deployments.engine.kernels.modules import QuantLinear4, Saved4
from deployments.engine.kernels.weights import Nested, Weight4, Weight8, dequantise4, dequantise8, tile4, tile8

BOUND = 1e-3


def weight4(draw: random.Random, n: int, k: int, blocksize: int, parts: int = 1) -> Weight4:
    """`parts`: of rows with an offset each, where double-quantised; more than one in tiles alone."""
    packed = torch.randint(0, 256, ((n * k + 1) // 2, 1), dtype=torch.uint8)
    blocks = -(-n * k // blocksize)
    if draw.random() < 0.5:
        nested = Nested(torch.rand(-(-blocks // 256)), torch.rand(256), torch.rand(parts))
        return Weight4(
            n, k, blocksize, packed, torch.randint(0, 256, (blocks,), dtype=torch.uint8), torch.randn(16), nested
        )
    return Weight4(n, k, blocksize, packed, torch.rand(blocks), torch.randn(16))


def close(out: Tensor, expected: Tensor, what: str) -> None:
    error = float((out.double() - expected).norm() / expected.norm())
    assert error <= BOUND, f"{what}: {error}"


def product(draw: random.Random, seed: int) -> None:
    torch.manual_seed(seed)
    blocksize = draw.choice((64, 128, 256))
    n, k, rows = 16 * draw.randint(1, 9), blocksize * draw.randint(1, 4), draw.randint(1, 20)
    config = GemmConfig(
        draw.choice((1, 2, 4)),
        draw.choice((1, 2, 4)),
        2,
        draw.randint(1, 3),
        ahead=draw.random() < 0.5,
        rounded=draw.random() < 0.5,
    )
    native: Weight4 | Weight8
    parts = draw.choice((1, n // 16))
    if draw.random() < 0.6:
        native = weight4(draw, n, k, blocksize, parts)
        tiled: Weight4 | Weight8 = tile4(native)
        dense = dequantise4(native, torch.float64)
    else:
        native = Weight8(n, k, torch.randint(-127, 128, (n, k), dtype=torch.int8), torch.rand(n))
        tiled = tile8(native)
        dense = dequantise8(native, torch.float64)
    bias = torch.randn(n, dtype=torch.float16) if draw.random() < 0.5 else None
    x = torch.randn(rows, k, dtype=torch.float16)
    expected = x.double() @ dense.t() + (0 if bias is None else bias.double())
    out = launch.small_product(x, tiled, bias, config, bucket=16)
    close(out, expected, f"{type(native).__name__} {n}x{k} rows {rows} {config}")
    assert torch.equal(out, launch.small_product(x, tiled, bias, config, bucket=16)), "not repeatable"
    assert not launch.prepare(x.device).arrivals.any(), "counters are left over"
    for weight in (native, tiled) if parts == 1 else (tiled,):
        rest = torch.full((n, k), torch.nan)
        launch.dequantise_rows(weight, 0, rest)
        close(rest, dense, "dequantised")
    x[0, k // 2] = torch.nan
    out = launch.small_product(x, tiled, bias, config, bucket=16)
    assert out[0].isnan().all(), "NaN is lost"
    assert not out[1:].isnan().any(), "NaN spreads"


def fused(draw: random.Random, seed: int) -> None:
    """Double-quantised linears of one input as one, each with an offset of its own."""
    torch.manual_seed(seed)
    apart = nn.Module()
    for name, n in (("q_proj", 128), ("k_proj", 64), ("v_proj", draw.choice((16, 48)))):
        packed, absmax = torch.randint(0, 256, (n * 128, 1), dtype=torch.uint8), torch.randint(0, 256, (n * 4,))
        nested = Nested(torch.rand(-(-n * 4 // 256)), torch.linspace(-1, 1, 256), torch.rand(1))
        weight = Weight4(n, 256, 64, packed, absmax.to(torch.uint8), torch.linspace(-1, 1, 16), nested)
        setattr(apart, name, QuantLinear4(tile4(weight), None, torch.float16, Saved4("nf4", torch.float16)))
    weights = [child.quantised for child in apart.children() if isinstance(child, QuantLinear4)]
    assert fuse_linears(apart) == 1
    whole = next(child.fused.whole.quantised for child in apart.children() if isinstance(child, Part))
    x, config = torch.randn(5, 256, dtype=torch.float16), GemmConfig(4, 1, 2, 1, rounded=draw.random() < 0.5)
    out = launch.small_product(x, whole, None, config, bucket=16)
    expected = torch.cat([launch.small_product(x, weight, None, config, bucket=16) for weight in weights], dim=1)
    close(out, expected.double(), "fused")
    dense = torch.cat([dequantise4(weight, torch.float32) for weight in weights])
    rest = torch.empty_like(dense)
    launch.dequantise_rows(whole, 0, rest)
    close(rest, dense.double(), "fused and dequantised")


def decodes(draw: random.Random, seed: int) -> None:
    """Sequences in shuffled blocks whose other places are NaN, and rows that are views, as a model's are."""
    torch.manual_seed(seed)
    kv_heads, group, size, block_size = (
        draw.choice((1, 2)),
        draw.choice((1, 3, 4, 16)),
        draw.choice((64, 128, 256)),
        draw.choice((8, 16)),
    )
    lengths = [draw.choice((1, 31, 32, 33, draw.randint(1, 300))) for _ in range(draw.choice((1, 3)))]
    needs = [-(-length // block_size) for length in lengths]
    ids = draw.sample(range(sum(needs) + 3), sum(needs))
    spans = [RowSpan(n - 1, 1, tuple(ids.pop() for _ in range(need))) for n, need in zip(lengths, needs, strict=True)]
    past = [torch.randn(2, length, kv_heads, size) for length in lengths]
    blocks = torch.full((2, sum(needs) + 3, block_size, kv_heads, size), torch.nan)
    for span, tokens in zip(spans, past, strict=True):
        for position in range(span.start):
            at = span.block_table[position // block_size]
            blocks[:, at, position % block_size] = tokens[:, position]
    spans += [RowSpan(0, 0, ())] * draw.choice((0, 0, 2))  # a graph has room for more
    numbers, splits = np.zeros(1024, np.int32), draw.choice((1, 2, 9))
    shape = pack(spans, block_size, numbers, splits=splits)
    tables = Tables.view(torch.from_numpy(numbers), shape)
    rows, heads = len(lengths), kv_heads * group
    query = torch.randn(heads, rows, size).transpose(0, 1)
    key, value = torch.stack([tokens[:, -1].flatten(0, 1) for tokens in past]).split(kv_heads, dim=1)
    kind = Kind(heads, kv_heads, size, torch.float32, torch.float32, None, None)
    out = torch.empty(rows, heads, size)
    space = torch.empty(attention_decodes.space_bytes(kind, len(spans), splits), dtype=torch.uint8)
    arrivals = attention_decodes.counters(torch.device("cpu"))
    attention_decodes.attend(
        *(query, key, value, *blocks, out, tables),
        **{"scale": 0.2, "splits": splits, "space": space, "arrivals": arrivals, "overlap": False},
    )
    assert not arrivals.any(), "counters are left over"
    for row, (span, tokens) in enumerate(zip(spans, past, strict=False)):
        written = blocks[:, span.block_table[-1], span.start % block_size]
        assert torch.equal(written, tokens[:, -1]), "the row's key or value is not in its block"
        keys, values = tokens.double().repeat_interleave(group, 2)
        weights = (torch.einsum("hd,lhd->hl", query[row].double(), keys) * 0.2).softmax(-1)
        close(out[row], torch.einsum("hl,lhd->hd", weights, values), f"{lengths}, {heads} heads, {splits} splits")


def main() -> None:
    draw = random.Random(7)
    for seed in range(14):
        product(draw, seed)
    for seed in range(2):
        fused(draw, seed)
    for seed in range(8):
        decodes(draw, seed)
    print("all agree")


if __name__ == "__main__":
    main()
