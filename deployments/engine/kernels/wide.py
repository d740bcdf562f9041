"""Products of tens to hundreds of rows with a tiled weight by the CUDA kernel of `wide.cu`. Needs capability 9.0:
it is written in the matrix instructions of such GPUs."""

from __future__ import annotations

import ctypes
from functools import cache, partial

import torch
from torch import Tensor

from deployments.engine.kernels import driver
from deployments.engine.kernels.cubin import compiled
from deployments.engine.kernels.skinny import aligned, format_of, operands
from deployments.engine.kernels.slab import Slab
from deployments.engine.kernels.weights import Weight4, Weight8


def wide_product(x: Tensor, weight: Weight4 | Weight8, bias: Tensor | None, slab: Slab) -> Tensor:
    """x [rows, k] times a tiled weight, plus bias [n] -> [rows, n] in x's dtype.

    Raises:
        RuntimeError: NVRTC is missing or can't compile the kernel, or the driver refuses it; with its words.
    """
    rows, n, k = x.shape[0], weight.n, weight.k
    x, out = aligned(x), torch.empty(rows, n, dtype=x.dtype, device=x.device)
    format = format_of(weight, x.dtype)
    shared, row_blocks = slab.shared_bytes(format["BITS"]), -(-rows // slab.rows)
    kernel = _kernel(x.device, slab, tuple(format.items()), shared)
    numbers = (rows, n, k // 64, row_blocks)
    driver.launch(
        kernel,
        slab.blocks(rows, n),
        slab.threads,
        slab.cluster,
        shared,
        [driver.tensor_map(x, slab.rows), *operands(weight, bias, out), *map(ctypes.c_int, numbers)],
    )
    return out


@cache
def _kernel(_device: torch.device, slab: Slab, format: tuple[tuple[str, int], ...], shared: int) -> ctypes.c_void_p:
    """Loaded on the current device, which `_device` names: each has kernels of its own."""
    return driver.load("wide", shared, partial(compiled, "wide", slab.macros() | dict(format), "sm_90a"))
