"""Fused experts quantised while a checkpoint is loaded, one tensor after the other, or once it is there.

transformers quantises the linears of a checkpoint one by one as it reads them. Inside `quantising_experts` it does so
with fused experts too, so that never more than one of them is there in 16 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer

from deployments.engine.experts import IMPLEMENTATION, EightBitExperts, FourBitExperts, eight_bits, four_bits
from placement.anatomy import fused_experts, own_fused_experts
from placement.plan import Plan
from placement.recipe import BLOCK


class _Quantise(ConversionOps):
    """Quantises fused experts, and leaves linears to transformers' own operation."""

    def __init__(self, own: Any, plan: Plan) -> None:
        self._own, self._plan = own, plan

    def convert(self, input_dict: dict[str, Any], *args: Any, **options: Any) -> dict[str, Any]:
        """Name -> parameter, quantised."""
        fused = {name: input_dict.pop(name) for name in list(input_dict) if _is_experts(options["model"], name)}
        converted: dict[str, Any] = self._own.convert(input_dict, *args, **options) if input_dict else {}
        while fused:
            name, value = fused.popitem()
            converted[name] = _quantised(value[0] if isinstance(value, list) else value, self._plan)
        return converted


@contextmanager
def quantising_experts(plan: Plan) -> Iterator[None]:
    """Let `from_pretrained` with bitsandbytes' config of the plan quantise fused experts too."""
    kind: Any = Bnb8BitHfQuantizer if plan.quantization == "int8" else Bnb4BitHfQuantizer
    needs, operation = kind.param_needs_quantization, kind.get_quantize_ops
    kind.param_needs_quantization = lambda self, model, name, **options: (
        _is_experts(model, name) or needs(self, model, name, **options)
    )
    kind.get_quantize_ops = lambda self: _Quantise(operation(self), plan)
    try:
        yield
    finally:
        kind.param_needs_quantization, kind.get_quantize_ops = needs, operation


def settle_experts(model: PreTrainedModel, plan: Plan, *, on_gpu: bool) -> None:
    """Put `QuantisedExperts` in the place of all fused experts of `model`, and quantise those that are not yet, one
    after the other; each is freed before the next."""
    found = fused_experts(model, BLOCK) | _quantised_already(model)
    for name in list(found):
        weight: Any = found.pop(name)
        path, _, attribute = name.rpartition(".")
        owner = model.get_submodule(path)
        delattr(owner, attribute)
        if not (hasattr(weight, "quant_state") or hasattr(weight, "scales")):
            weight = _quantised(weight, plan)
        dtype = getattr(torch, plan.dtype)
        experts = EightBitExperts(weight, dtype) if hasattr(weight, "scales") else FourBitExperts(weight)
        setattr(owner, attribute, experts)
        del weight
    # On the CPU the model's own forward dequantises only those that are hit.
    model.set_experts_implementation(IMPLEMENTATION if on_gpu else "eager")


def _quantised(weight: Tensor, plan: Plan) -> Any:
    if plan.quantization == "int8":
        return eight_bits(weight)
    return four_bits(weight, plan.quantization, double_quant=plan.double_quant)


def _is_experts(model: nn.Module, name: str) -> bool:
    path, _, attribute = name.rpartition(".")
    return attribute in own_fused_experts(model.get_submodule(path), BLOCK)


def _quantised_already(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        f"{path}.{name}": parameter
        for path, module in model.named_modules()
        if hasattr(module, "has_gate")
        for name, parameter in module.named_parameters(recurse=False)
        if hasattr(parameter, "quant_state") or hasattr(parameter, "scales")
    }
