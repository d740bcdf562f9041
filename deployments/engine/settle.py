"""A loaded model's layers as they will be served: on this project's kernels, each in one allocation."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterable
from typing import Any

import torch
from bitsandbytes.nn import modules as bitsandbytes_modules
from torch import nn

from deployments.engine.grouped_stored import StoredLinear
from deployments.engine.residents import move_to_arena

log = logging.getLogger(__name__)
modules: Any = bitsandbytes_modules
_PINNED_MB = 64
"""Main memory, in MiB, for uploads of steps and what is read of them."""


def settle_layers(model: nn.Module, layers: Iterable[nn.Module], *, kernels: bool, arenas: bool) -> None:
    """Put this project's kernels in place of bitsandbytes' linears, make linears of one input one product, and move
    each layer into an arena; on GPUs.

    One layer after the other, so that memory peaks at one layer more: what a layer leaves is given back before the
    next.
    """
    done = [0, 0]
    for part in (*layers, model):  # the model last, for what is beside its layers
        if kernels:
            done = [sum(pair) for pair in zip(done, _use_kernels(part), strict=True)]
        if arenas and part is not model:
            move_to_arena(part)
            torch.cuda.empty_cache()
    if any(done):
        log.info("%d linears on Headroom's kernels, %d groups of linears fused", *done)


def expand_segments() -> None:
    """Give back what loading took, before the KV cache is made of what the plan says is free.

    Until here each large tensor has a segment of its own, which is given back whole. From here on segments expand, so
    that steps of ever other sizes share them: while tensors are replaced, those keep holes of up to a page of 20 MiB.
    """
    gc.collect()
    torch.cuda.empty_cache()
    private: Any = torch._C
    set_allocator = getattr(private, "_accelerator_setAllocatorSettings", None)  # its name from some torch on
    settings = "expandable_segments:True"
    if torch.cuda.is_available():
        # What steps pin comes from one segment: CUDA takes up to 9 ms to pin a few bytes, while a request waits.
        settings += f",pinned_reserve_segment_size_mb:{_PINNED_MB}"
    (set_allocator or torch.cuda.memory._set_allocator_settings)(settings)


def buffer_bytes(model: nn.Module, dtype: torch.dtype) -> dict[torch.device, int]:
    """What the kernels dequantise into on each CUDA device at most: the largest of its quantised linears that they will
    replace, and another fused with it, in the compute dtype. A plan counts the same.

    Args:
        dtype: in which those compute that don't say it.
    """
    found: dict[torch.device, int] = {}
    for module in model.modules():
        linear: Any = module
        if isinstance(module, modules.Linear4bit | modules.Linear8bitLt | StoredLinear):
            computed = getattr(linear, "compute_dtype", None) or dtype
            size = 2 * linear.out_features * linear.in_features * computed.itemsize
            device = (linear.qweight if isinstance(module, StoredLinear) else linear.weight).device
            found[device] = max(found.get(device, 0), size)
    return found


def make_buffers(model: nn.Module, dtype: torch.dtype) -> None:
    """One for each device, before the first linear is replaced or repacked: a buffer that grows leaves those before it
    behind, as captured graphs may name them, and three of an 8B model's took 150 MB more than the last."""
    from deployments.engine.kernels.workspace import prepare

    for device, size in buffer_bytes(model, dtype).items():
        if device.type == "cuda":
            prepare(device, size)


def _use_kernels(part: nn.Module) -> tuple[int, int]:
    """How many linears were replaced, and how many groups fused."""
    from deployments.engine.kernels.fuse import fuse_linears
    from deployments.engine.kernels.modules import replace_linears

    return replace_linears(part), fuse_linears(part)
