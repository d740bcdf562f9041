"""Linears on the kernels: in place of bitsandbytes' `Linear4bit` and `Linear8bitLt`, holding the same bytes.

`state_dict()` gives bitsandbytes' names and bits, so `save_pretrained` writes a standard checkpoint.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from typing import Any, Self

import bitsandbytes.functional
import bitsandbytes.nn.modules
import torch
from torch import Tensor, nn

from deployments.engine.kernels import ops, repack
from deployments.engine.kernels.weights import NESTED_BLOCK, Nested, Weight4, Weight8, tile4, tile8, untile4, untile8
from deployments.engine.kernels.workspace import prepare

log = logging.getLogger(__name__)


CAPABILITY = (8, 0)
"""Of a GPU that the kernels run on: Ampere's, which has instructions for bfloat16 and for pairs of 16-bit numbers."""


@dataclass(frozen=True)
class Saved4:
    """What a checkpoint says of a 4-bit weight beside its tensors."""

    quant_type: str
    """nf4 or fp4."""
    dtype: torch.dtype
    """Of the weight before it was quantised."""
    storage: torch.dtype = torch.uint8
    """As which the packed bytes are stored."""


class QuantLinear4(nn.Module):
    """x [..., k] -> [..., n] with a weight in NF4 or FP4."""

    packed: Tensor
    absmax: Tensor
    code: Tensor
    nested_absmax: Tensor | None
    nested_code: Tensor | None
    offset: Tensor | None

    def __init__(self, weight: Weight4, bias: Tensor | None, compute_dtype: torch.dtype, saved: Saved4) -> None:
        super().__init__()
        self.in_features, self.out_features, self.blocksize = weight.k, weight.n, weight.blocksize
        self.compute_dtype, self.saved = compute_dtype, saved
        nested = weight.nested
        for name, tensor in {
            "packed": weight.packed,
            "absmax": weight.absmax,
            "code": weight.code,
            "nested_absmax": None if nested is None else nested.absmax,
            "nested_code": None if nested is None else nested.code,
            "offset": None if nested is None else nested.offset,
        }.items():
            self.register_buffer(name, tensor, persistent=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().to(compute_dtype), requires_grad=False)
        _prepare(weight, compute_dtype)

    @classmethod
    def of(cls, linear: Any) -> Self:
        """From a `bitsandbytes.nn.Linear4bit` whose weight is quantised; its bytes are repacked, not requantised."""
        state = linear.weight.quant_state
        nested = None
        if state.nested:
            nested = Nested(state.state2.absmax, state.state2.code, state.offset.reshape(1))
        n, k = state.shape
        packed = linear.weight.data.view(torch.uint8).reshape(-1, 1)
        weight = Weight4(n, k, state.blocksize, packed, state.absmax, state.code, nested)
        weight = tile4(weight) if _suits(n, k, state.blocksize) else weight
        saved = Saved4(state.quant_type, state.dtype, linear.weight.dtype)
        return cls(weight, linear.bias, linear.compute_dtype or state.dtype, saved)

    @property
    def quantised(self) -> Weight4:
        """The weight as the kernels take it."""
        nested = None
        if self.nested_absmax is not None and self.nested_code is not None and self.offset is not None:
            nested = Nested(self.nested_absmax, self.nested_code, self.offset)
        return Weight4(self.out_features, self.in_features, self.blocksize, self.packed, self.absmax, self.code, nested)

    @property
    def weight(self) -> Tensor:
        """The packed bytes, for model code that asks for the weight's dtype or device."""
        return self.packed.view(torch.uint8)

    def forward(self, x: Tensor) -> Tensor:
        """In the compute dtype; the result has x's dtype."""
        out: Tensor = ops.linear_4bit(
            x.to(self.compute_dtype),
            self.packed,
            self.absmax,
            self.code,
            self.nested_absmax,
            self.nested_code,
            self.offset,
            self.bias,
            self.out_features,
            self.in_features,
            self.blocksize,
        )
        return out.to(x.dtype)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = untile4(self.quantised) if self.quantised.tiled else self.quantised
        save4(weight, self.saved, destination, prefix)

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"{self.in_features}, {self.out_features}, {self.saved.quant_type}, tiled={self.quantised.tiled}"


class QuantLinear8(nn.Module):
    """x [..., k] -> [..., n] with an int8 weight and a scale per row, in x's dtype: no outlier pass, activations are
    not quantised."""

    packed: Tensor
    absmax: Tensor

    def __init__(self, weight: Weight8, bias: Tensor | None) -> None:
        super().__init__()
        self.in_features, self.out_features = weight.k, weight.n
        self.register_buffer("packed", weight.packed, persistent=False)
        self.register_buffer("absmax", weight.absmax, persistent=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        _prepare(weight, torch.bfloat16)

    @classmethod
    def of(cls, linear: Any) -> Self:
        """From a `bitsandbytes.nn.Linear8bitLt` whose weight is quantised."""
        state = linear.state
        codes = linear.weight.data if state.CB is None else state.CB
        absmax = linear.weight.SCB if state.SCB is None else state.SCB
        n, k = codes.shape
        weight = Weight8(n, k, codes, absmax)
        return cls(tile8(weight) if _suits(n, k, None) else weight, linear.bias)

    @property
    def quantised(self) -> Weight8:
        """The weight as the kernels take it."""
        return Weight8(self.out_features, self.in_features, self.packed, self.absmax)

    @property
    def weight(self) -> Tensor:
        """The int8 codes, for model code that asks for the weight's dtype or device."""
        return self.packed.view(torch.int8)

    def forward(self, x: Tensor) -> Tensor:
        """The result has x's dtype."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        out: Tensor = ops.linear_8bit(x, self.packed, self.absmax, bias, self.out_features, self.in_features)
        return out

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        save8(untile8(self.quantised) if self.quantised.tiled else self.quantised, destination, prefix)

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"{self.in_features}, {self.out_features}, int8, tiled={self.quantised.tiled}"


def save4(weight: Weight4, saved: Saved4, destination: dict[str, Any], prefix: str) -> None:
    """Add an untiled weight to a state dict under bitsandbytes' names."""
    make: Any = bitsandbytes.functional.QuantState
    nested = weight.nested
    inner = None
    if nested is not None:
        inner = make(nested.absmax, code=nested.code, blocksize=NESTED_BLOCK, dtype=torch.float32)
    state = make(
        weight.absmax,
        shape=torch.Size((weight.n, weight.k)),
        code=weight.code,
        blocksize=weight.blocksize,
        quant_type=saved.quant_type,
        dtype=saved.dtype,
        offset=None if nested is None else nested.offset.reshape(()),
        state2=inner,
    )
    destination[prefix + "weight"] = weight.packed.view(-1).view(saved.storage).view(-1, 1)
    for name, tensor in state.as_dict(packed=True).items():
        destination[f"{prefix}weight.{name}"] = tensor.detach()


def save8(weight: Weight8, destination: dict[str, Any], prefix: str) -> None:
    """Add an untiled weight to a state dict under bitsandbytes' names."""
    destination[prefix + "weight"] = weight.packed
    destination[prefix + "SCB"] = weight.absmax
    destination[prefix + "weight_format"] = torch.tensor(0, dtype=torch.uint8)  # bitsandbytes' row-major


def replace_linears(model: nn.Module) -> int:
    """Put the kernels in place of bitsandbytes' linears on CUDA devices, one by one, so that memory peaks at one
    weight more; those on a CPU stay, and those on GPUs that are too old. Returns how many were replaced."""
    four, eight = bitsandbytes.nn.modules.Linear4bit, bitsandbytes.nn.modules.Linear8bitLt
    count = 0
    for name, module in list(model.named_modules()):
        if not isinstance(module, four | eight) or module.weight.device.type != "cuda":
            continue
        if (reason := why_not_on(module.weight.device)) is not None:
            _stays(reason)
            continue
        new = QuantLinear4.of(module) if isinstance(module, four) else QuantLinear8.of(module)
        new.train(module.training)
        model.set_submodule(name, new)
        _release(module)
        count += 1
    return count


def _release(linear: Any) -> None:
    """Let go of a replaced linear's tensors: it and its weight refer to each other, so they would stay until Python
    collects cycles, and a second copy of the model with them."""
    weight = linear._parameters.pop("weight")
    weight.module = weight.quant_state = linear.quant_state = linear.state = None
    weight.data = weight.data.new_empty(0)


def _suits(n: int, k: int, blocksize: int | None) -> bool:
    reason = repack.why_not_tiled(n, k, blocksize)
    if reason is not None:
        _tell(n, k, reason)
    return reason is None


def why_not_on(device: torch.device) -> str | None:
    """Why the kernels can't run on a CUDA device, as a clause; None: they can."""
    capability = torch.cuda.get_device_capability(device)
    if capability >= CAPABILITY:
        return None
    name, needed = torch.cuda.get_device_name(device), "{}.{}".format(*CAPABILITY)
    return f"{device} ({name}) has compute capability {capability[0]}.{capability[1]}, and they need {needed}"


@cache
def _stays(reason: str) -> None:
    log.warning("linears stay on bitsandbytes' kernels instead of Headroom's: %s", reason)


@cache
def _tell(n: int, k: int, reason: str) -> None:
    log.warning("the %dx%d linears are dequantised for every product: %s", n, k, reason)


def _prepare(weight: Weight4 | Weight8, dtype: torch.dtype) -> None:
    """Allocate what its products need now: under a CUDA graph it would be too late."""
    if weight.packed.device.type == "cuda":
        prepare(weight.packed.device, max(repack.TILE_ROWS, weight.n) * weight.k * dtype.itemsize)
