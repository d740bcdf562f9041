"""bitsandbytes' own linears, where they serve: told what to compute in, and called without what they check."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from placement.plan import Plan


def compute_as_planned(model: PreTrainedModel, plan: Plan, threshold: float) -> None:
    """Give bitsandbytes' linears the plan's dtype and this outlier threshold, whatever a quantised checkpoint says.

    In float32, its AVX512-BF16 path is switched off, which rounds activations and scales to bfloat16 inside.
    """
    dtype = getattr(torch, plan.dtype)
    for module in model.modules():
        linear: Any = module
        if hasattr(module, "compute_type_is_set"):  # 4 bits
            linear.compute_dtype, linear.compute_type_is_set = dtype, True
        elif hasattr(getattr(module, "state", None), "threshold"):  # 8 bits
            linear.state.threshold = threshold
        if plan.dtype == "float32" and hasattr(module, "support_avx512bf16_for_cpu"):
            linear.support_avx512bf16_for_cpu = False


def shorten_linears(model: nn.Module) -> None:
    """Let bfloat16 linears that bitsandbytes repacked for the CPU call its kernel without its module's checks.

    The same kernel on the same tensors, so the same bits; a third of a small linear's time is in those checks.
    """
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False) and getattr(module, "compute_dtype", None) == torch.bfloat16:
            module.forward = _packed_linear(module)  # of this instance alone


def _packed_linear(module: nn.Module) -> Callable[[Tensor], Tensor]:
    weight: Any = module.weight
    state, bias = weight.quant_state, getattr(module, "bias", None)
    kernel = torch.ops.bitsandbytes.gemv_4bit.default
    packed, shape, absmax, code, block = weight.data, state.shape, state.absmax, state.code, state.blocksize

    def forward(x: Tensor) -> Tensor:
        out: Tensor = kernel(x, packed, shape, absmax, code, block)
        return out if bias is None else out.add_(bias)

    return forward
