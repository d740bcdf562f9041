"""Experts that transformers fuses into one tensor, quantised: bitsandbytes knows linears alone.

A fused weight is [experts, a, b]. Where it was, its module finds a `QuantisedExperts`, which answers `weight[expert]`
with that expert's weights in the compute dtype; so the model's own forward stays as it is. That forward asks the host
which experts are hit. On GPUs `experts_forward` takes its place, which asks nothing: every shape in it is known
beforehand, so that a step can be captured in a CUDA graph. Where rows must not depend on each other
(`deployments.engine.invariant`), `invariant_experts_forward` does, for quantised experts and others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from bitsandbytes.nn.modules import Params4bit
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.integrations.moe import ExpertsInterface, batched_mm_experts_forward, grouped_mm_experts_forward

from deployments.errors import ConfigError
from placement.recipe import BLOCK

IMPLEMENTATION = "headroom_experts"
"""By this name transformers' experts run `experts_forward`."""
INVARIANT = "headroom_invariant_experts"
"""By this name they run `invariant_experts_forward`."""
_MOST_ELEMENTS = 2**31
"""bitsandbytes' kernels count in 32 bits."""


class QuantisedExperts(nn.Module, ABC):
    """Weights [experts, a, b] in 4 or 8 bits, and `dtype`, in which they are handed out."""

    dtype: torch.dtype

    def __getitem__(self, expert: Tensor | int) -> Tensor:
        """[a, b] of one expert, or [n, a, b] of the experts in an int64 tensor [n]."""
        if isinstance(expert, Tensor) and expert.dim():
            return self._dequantised(expert)
        index = int(expert)
        return self._dequantised(slice(index, index + 1))[0]

    def whole(self) -> Tensor:
        """[experts, a, b]."""
        return self._dequantised(slice(None))

    @abstractmethod
    def _dequantised(self, which: Tensor | slice) -> Tensor:
        """[n, a, b]."""


class FourBitExperts(QuantisedExperts):
    """NF4 or FP4, in bitsandbytes' format: what it makes of the weight [experts * a, b], with one state for all.

    Args:
        packed: as `four_bits` makes it; each expert is whole blocks.
    """

    def __init__(self, packed: Any) -> None:
        super().__init__()
        state = packed.quant_state
        self.dtype, self.shape = state.dtype, state.shape
        self.weight = packed

    def _dequantised(self, which: Tensor | slice) -> Tensor:
        experts, rows, columns = self.shape
        state: Any = self.weight.quant_state
        scales = state.absmax.view(experts, -1)[which]
        if state.nested:
            blocks = _blocks(which, experts, scales.shape[-1], scales.device)
            scales = state.state2.code[scales.long()] * state.state2.absmax[blocks // state.state2.blocksize]
            scales = scales + state.offset
        packed = self.weight.data.view(experts, -1)[which]
        weight: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
            packed.reshape(-1, 1),
            scales.reshape(-1),
            BLOCK,
            state.quant_type,
            (packed.shape[0], rows, columns),
            self.dtype,
        )
        return weight


def _blocks(which: Tensor | slice, experts: int, per: int, device: torch.device) -> Tensor:
    """int64 [n, per]: the places of those experts' blocks among all."""
    if isinstance(which, Tensor):
        return which[:, None] * per + torch.arange(per, device=device)
    start, stop, _ = which.indices(experts)
    return torch.arange(start * per, stop * per, device=device).view(-1, per)


class EightBitExperts(QuantisedExperts):
    """int8 with a scale for each row of each expert.

    Args:
        rounded: as `eight_bits` makes it.
        dtype: in which weights are handed out.
    """

    weight: Tensor
    scales: Tensor

    def __init__(self, rounded: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.register_buffer("weight", rounded.data)
        self.register_buffer("scales", rounded.scales)

    def _dequantised(self, which: Tensor | slice) -> Tensor:
        return (self.weight[which] * (self.scales[which] / 127)[..., None]).to(self.dtype)


def four_bits(weight: Tensor, kind: str, *, double_quant: bool) -> Any:
    """bitsandbytes' parameter of a weight [experts, a, b]: packed, with its state.

    Args:
        kind: nf4 or fp4.
        double_quant: the scales are quantised too.

    Raises:
        ConfigError: it is larger than bitsandbytes' kernels count.
    """
    if weight.numel() >= _MOST_ELEMENTS:
        raise ConfigError(
            f"experts of {weight.numel():,} weights in one tensor are more than bitsandbytes quantises to {kind} "
            f"({_MOST_ELEMENTS:,}); use int8, or leave quantize_experts out"
        )
    unpacked: Any = Params4bit(
        weight.detach(), requires_grad=False, blocksize=BLOCK, quant_type=kind, compress_statistics=double_quant
    )
    packed: Any = unpacked.to(weight.device)
    own: Any = packed.quant_state
    own.code = own.code.clone()  # bitsandbytes hands out one for all
    if own.nested:
        own.state2.code = own.state2.code.clone()
    return packed


def eight_bits(weight: Tensor) -> Any:
    """A parameter int8 [experts, a, b] with `scales`, float32 [experts, a], of a weight [experts, a, b]."""
    rounded = torch.empty_like(weight, dtype=torch.int8)
    scales = torch.empty(weight.shape[:2], dtype=torch.float32, device=weight.device)
    for expert, rows in enumerate(weight.detach()):
        scales[expert] = rows.abs().amax(-1)
        scale = scales[expert].clamp(min=torch.finfo(torch.float32).tiny)  # rows of zeros
        rounded[expert] = (rows * (127 / scale)[:, None]).round().to(torch.int8)
    parameter: Any = nn.Parameter(rounded, requires_grad=False)
    parameter.scales = scales
    return parameter


def experts_forward(experts: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """A layer's experts on all tokens of a step, without asking the host which of them are hit.

    Where tokens visit no more experts than there are, weights are dequantised visit by visit; else all of them, once.

    Args:
        experts: transformers' module, whose weights are `QuantisedExperts`.
        hidden: [T, hidden].
        top_k_index: int64 [T, k], the experts that each token visits.
        top_k_weights: [T, k], of their results.

    Returns:
        [T, hidden].
    """
    if top_k_index.numel() <= experts.num_experts:  # type: ignore[operator]  # an int
        return batched_mm_experts_forward(experts, hidden, top_k_index, top_k_weights)
    dequantised: Any = _Dequantised(experts)
    return grouped_mm_experts_forward(dequantised, hidden, top_k_index, top_k_weights)


class _Dequantised:
    """A module of experts as transformers' grouped product takes it: with weights that are whole tensors."""

    def __init__(self, experts: nn.Module) -> None:
        self._experts = experts

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._experts, name)
        return value.whole() if isinstance(value, QuantisedExperts) else value


def invariant_experts_forward(experts: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """A layer's experts, where a row's bits depend on that row and T alone. The host asks which experts are visited.

    Each of those computes all rows, since the number that visit it would change how it sums. A row adds its own
    experts' results in float32, in the order of their ids.

    Args:
        experts: transformers' module, quantised or not.
        hidden: [T, hidden].
        top_k_index: int64 [T, k], the experts that each token visits.
        top_k_weights: [T, k], of their results.

    Returns:
        [T, hidden].
    """
    total = torch.zeros_like(hidden, dtype=torch.float32)
    for expert in sorted(set(top_k_index.flatten().tolist())):
        visits = top_k_index == expert
        weights = torch.where(visits, top_k_weights, 0).float().sum(-1, keepdim=True)
        added = total + _computed(experts, expert, hidden) * weights
        total = torch.where(visits.any(-1, keepdim=True), added, total)  # not + 0 * result, which may be infinite
    return total.to(hidden.dtype)


def _computed(experts: Any, expert: int, rows: Tensor) -> Tensor:
    """[T, hidden] of one expert, as its module describes itself to transformers' interface."""
    if experts.has_gate:
        inner = experts._apply_gate(_projected(experts, "gate_up_proj", expert, rows))
    else:
        inner = experts.act_fn(_projected(experts, "up_proj", expert, rows))
    result = _projected(experts, "down_proj", expert, inner)
    normed = getattr(experts, "has_post_expert_norm", False)  # transformers 5.17 does not say
    return experts.post_expert_norm(result) if normed else result


def _projected(experts: Any, name: str, expert: int, rows: Tensor) -> Tensor:
    weight = getattr(experts, name)[expert]
    bias = getattr(experts, f"{name}_bias")[expert] if experts.has_bias else None
    return linear(rows, weight.mT if experts.is_transposed else weight, bias)


ExpertsInterface.register(IMPLEMENTATION, experts_forward)
ExpertsInterface.register(INVARIANT, invariant_experts_forward)
