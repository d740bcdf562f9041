"""What timing a product takes: random weights, exact products, copies that no cache holds, and the memory floor."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deployments.engine.kernels.config import Kind
from deployments.engine.kernels.weights import Nested, Weight4, Weight8, dequantise4, dequantise8, tile4, tile8

ROTATED_BYTES = 256 * 2**20
"""Several times the L2 cache."""
BOUND = 3e-3
"""On |out - ref| / |ref|, in bfloat16."""
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def random_weight(kind: Kind, n: int, k: int, *, tiled: bool = True, nested: bool = False, blocksize: int = 64) -> Any:
    """A weight of random codes and scales."""
    if kind == "8bit":
        codes = torch.randint(-127, 128, (n, k), dtype=torch.int8, device="cuda")
        weight8 = Weight8(n, k, codes, torch.rand(n, device="cuda") * 0.1 + 0.01)
        return tile8(weight8) if tiled else weight8
    packed = torch.randint(0, 256, ((n * k + 1) // 2, 1), dtype=torch.uint8, device="cuda")
    blocks = -(-n * k // blocksize)
    code = torch.tensor(NF4, device="cuda")
    outer = None
    absmax = torch.rand(blocks, device="cuda") * 0.05 + 0.01
    if nested:
        absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8, device="cuda")
        inner = torch.rand(-(-blocks // 256), device="cuda") * 0.02 + 0.01
        outer = Nested(inner, torch.linspace(-1, 1, 256, device="cuda"), torch.tensor([0.03], device="cuda"))
    weight4 = Weight4(n, k, blocksize, packed, absmax, code, outer)
    return tile4(weight4) if tiled else weight4


def exact(weight: Any) -> Tensor:
    """float64 [n, k]."""
    return dequantise4(weight, torch.float64) if isinstance(weight, Weight4) else dequantise8(weight, torch.float64)


def relative_error(out: Tensor, expected: Tensor) -> float:
    """|out - expected| / |expected|; infinite for NaN."""
    error = float((out.double() - expected).norm() / expected.norm())
    return error if math.isfinite(error) else math.inf


def copy_bandwidth() -> float:
    """Bytes read and written per second by a large copy on the device: the best of twenty, in eager mode (copies in a
    CUDA graph run slower). Without a GPU, of a smaller one in main memory."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = torch.empty(2**31 if device == "cuda" else 2**26, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(_copy_s(source, target) for _ in range(20))


def _copy_s(source: Tensor, target: Tensor) -> float:
    if source.device.type == "cpu":
        began = time.perf_counter()
        target.copy_(source)
        return time.perf_counter() - began
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    target.copy_(source)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


def rotate(make: Callable[[], Any], nbytes: int) -> list[Any]:
    """Enough copies of something of `nbytes` that none is still in the cache when it is used again."""
    return [make() for _ in range(max(2, min(64, math.ceil(ROTATED_BYTES / nbytes))))]


def floor_us(weight_bytes: int, rows: int, n: int, k: int, bandwidth: float) -> float:
    """Microseconds for weight, x and output, each moved once."""
    return (weight_bytes + 2 * rows * (n + k)) / bandwidth * 1e6
