"""Experts that transformers fuses into one tensor, quantised: bitsandbytes knows linears alone.

A fused weight is [experts, a, b]. Where it was, its module finds a `QuantisedExperts`, which answers `weight[expert]`
with that expert's weights in the compute dtype; so the model's own forward stays as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from bitsandbytes.nn.modules import Params4bit
from torch import Tensor, nn
from transformers import PreTrainedModel

from placement.anatomy import fused_experts
from placement.plan import Plan
from placement.recipe import BLOCK


class FourBitExperts(nn.Module):
    """NF4 or FP4, in bitsandbytes' format: what it makes of the weight [experts * a, b], with one state for all.

    Args:
        weight: [experts, a, b], of which each expert is whole blocks.
        kind: nf4 or fp4.
        double_quant: the scales are quantised too.
    """

    def __init__(self, weight: Tensor, kind: str, *, double_quant: bool) -> None:
        super().__init__()
        self.dtype, self.shape = weight.dtype, weight.shape
        packed: Any = Params4bit(
            weight.detach(), requires_grad=False, blocksize=BLOCK, quant_type=kind, compress_statistics=double_quant
        )
        self.weight = packed.to(weight.device)
        own: Any = self.weight.quant_state
        own.code = own.code.clone()  # bitsandbytes hands out one for all
        if own.nested:
            own.state2.code = own.state2.code.clone()

    def __getitem__(self, expert: Tensor | int) -> Tensor:
        """[a, b] of one expert, in the dtype that the weight had."""
        state, index = self.weight.quant_state, int(expert)
        blocks = self.shape[1] * self.shape[2] // BLOCK
        of = slice(index * blocks, (index + 1) * blocks)
        scales = state.absmax[of]
        if state.nested:
            outer = torch.arange(of.start, of.stop, device=scales.device) // state.state2.blocksize
            scales = state.state2.code[scales.long()] * state.state2.absmax[outer] + state.offset
        one = QuantState(scales, self.shape[1:], state.code, BLOCK, state.quant_type, self.dtype)  # type: ignore[no-untyped-call]  # untyped
        half = BLOCK // 2
        weight: Tensor = dequantize_4bit(self.weight.data.view(-1, 1)[of.start * half : of.stop * half], one)
        return weight


class EightBitExperts(nn.Module):
    """int8 with a scale for each row of each expert.

    Args:
        weight: [experts, a, b].
    """

    weight: Tensor
    scales: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.dtype = weight.dtype
        rounded, scales = torch.empty_like(weight, dtype=torch.int8), weight.new_empty(weight.shape[:2]).float()
        for expert, rows in enumerate(weight.detach()):
            scales[expert] = rows.abs().amax(-1)
            scale = scales[expert].clamp(min=torch.finfo(torch.float32).tiny)  # rows of zeros
            rounded[expert] = (rows * (127 / scale)[:, None]).round().to(torch.int8)
        self.register_buffer("weight", rounded)
        self.register_buffer("scales", scales)

    def __getitem__(self, expert: Tensor | int) -> Tensor:
        """[a, b] of one expert, in the dtype that the weight had."""
        rounded: Tensor = self.weight[int(expert)]
        return (rounded * (self.scales[int(expert)] / 127)[:, None]).to(self.dtype)


def quantise_experts(model: PreTrainedModel, plan: Plan) -> None:
    """Quantise all fused experts of `model` as `plan` says, one after the other; each is freed before the next."""
    found = fused_experts(model, BLOCK)
    for name in list(found):
        weight = found.pop(name)
        path, _, attribute = name.rpartition(".")
        owner = model.get_submodule(path)
        delattr(owner, attribute)
        if plan.quantization == "int8":
            experts: nn.Module = EightBitExperts(weight)
        else:
            experts = FourBitExperts(weight, plan.quantization, double_quant=plan.double_quant)
        setattr(owner, attribute, experts)
        del weight
    model.set_experts_implementation("eager")  # the others take all experts' weights as one tensor
