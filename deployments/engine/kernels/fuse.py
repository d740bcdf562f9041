"""Linears of one input computed as one product: q, k and v; gate and up.

The weights are concatenated along their rows; each of the old places holds a `Part`. Model code stays as it is: the
first part that is called computes all of them, the others hand out their columns of the same result.
"""

from __future__ import annotations

import logging
from itertools import pairwise
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn

from deployments.engine.kernels.grouped import NOT_SAVED, GroupedLinear4
from deployments.engine.kernels.modules import QuantLinear4, QuantLinear8, save4, save8
from deployments.engine.kernels.weights import NESTED_BLOCK, Nested, Weight4, Weight8, untile4, untile8

log = logging.getLogger(__name__)

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
"""Siblings that read the same input in the models of transformers, in the order in which they are called."""
_KINDS = (QuantLinear4, GroupedLinear4, QuantLinear8, nn.Linear)


class Fused(nn.Module):
    """Several linears of one input as one."""

    def __init__(self, whole: QuantLinear4 | QuantLinear8 | nn.Linear, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.whole, self.sizes = whole, sizes
        self._input: Tensor | None = None
        self._parts: tuple[Tensor, ...] = ()

    def part(self, index: int, x: Tensor) -> Tensor:
        """The result of linear `index`. Kept from its first until its last linear is asked for the same tensor."""
        if self._input is not x:
            self._input, self._parts = x, self.whole(x).split(self.sizes, dim=-1)
        out = self._parts[index]
        if index == len(self.sizes) - 1:
            self._input, self._parts = None, ()
        return out


class Part(nn.Module):
    """One of the fused linears, at its old place in the model."""

    def __init__(self, fused: Fused, index: int) -> None:
        super().__init__()
        self.index = index
        self.in_features, self.out_features = fused.whole.in_features, fused.sizes[index]
        if index == 0:
            self.fused = fused  # a submodule here alone: moved, saved and counted once
        else:
            object.__setattr__(self, "fused", fused)

    @property
    def weight(self) -> Tensor:
        """The packed bytes of all parts, for model code that asks for the weight's dtype or device."""
        return self.fused.whole.weight

    def forward(self, x: Tensor) -> Tensor:
        """x [..., k] -> [..., n of this part]: a view of the whole result."""
        return self.fused.part(self.index, x)

    def state_dict(self, *_: Any, **kwargs: Any) -> Any:
        """bitsandbytes' names for this part alone."""
        destination = kwargs.get("destination")
        destination = {} if destination is None else destination
        self._save(destination, kwargs.get("prefix", ""))
        return destination

    def _save(self, destination: dict[str, Any], prefix: str) -> None:
        sizes, whole = self.fused.sizes, self.fused.whole
        start = sum(sizes[: self.index])
        rows = slice(start, start + sizes[self.index])
        if whole.bias is not None:
            destination[prefix + "bias"] = whole.bias.detach()[rows]
        if isinstance(whole, nn.Linear):
            destination[prefix + "weight"] = whole.weight.detach()[rows]
        elif isinstance(whole, GroupedLinear4):
            raise NotImplementedError(NOT_SAVED)
        elif isinstance(whole, QuantLinear4):
            save4(untile4(_rows4(whole.quantised, rows)), whole.saved, destination, prefix)
        else:
            save8(untile8(_rows8(whole.quantised, rows)), destination, prefix)


def fuse_linears(model: nn.Module) -> int:
    """Fuse the siblings of `GROUPS` wherever they can be. Returns the number of groups fused."""
    count = 0
    for name, parent in list(model.named_modules()):
        for group in GROUPS:
            members = [getattr(parent, member, None) for member in group]
            if not all(type(member) in _KINDS for member in members):
                continue
            if (reason := _why_not(members)) is not None:
                log.info("%s: %s stay apart: %s", name, ", ".join(group), reason)
                continue
            fused = _fuse(members)
            for index, member in enumerate(group):
                setattr(parent, member, Part(fused, index).train(parent.training))
            count += 1
    return count


def _why_not(members: list[Any]) -> str | None:
    first = members[0]
    for a, b in pairwise(members):
        if type(a) is not type(b) or a.in_features != b.in_features or (a.bias is None) != (b.bias is None):
            return "they differ in kind, columns or bias"
    if isinstance(first, nn.Linear):
        weights = {(member.weight.device, member.weight.dtype) for member in members}
        return None if len(weights) == 1 else "they differ in device or dtype"
    if not all(member.quantised.tiled for member in members):
        return "their shapes don't suit tiles"
    if isinstance(first, QuantLinear4):
        if any(m.blocksize != first.blocksize or m.saved != first.saved for m in members):
            return "they differ in blocksize, code or dtype"
        if (reason := _why_scales_not_joined([member.quantised for member in members])) is not None:
            return reason
    if isinstance(first, GroupedLinear4):
        return next((reason for member in members if (reason := first.why_not_fused(member))), None)
    return None


def _why_scales_not_joined(weights: list[Weight4]) -> str | None:
    nested = [weight.nested for weight in weights if weight.nested is not None]
    if len(nested) not in (0, len(weights)):
        return "some are double-quantised"
    if any(not torch.equal(a.code, b.code) for a, b in pairwise(nested)):
        return "their scales are quantised by different codes"
    if nested and any(weight.absmax.numel() % NESTED_BLOCK for weight in weights[:-1]):
        return f"a block of {NESTED_BLOCK} scales would be of two linears (double quantisation)"
    return None


def _fuse(members: list[Any]) -> Fused:
    sizes = tuple(member.out_features for member in members)
    first = members[0]
    n, k = sum(sizes), first.in_features
    bias = None if first.bias is None else torch.cat([member.bias.detach() for member in members])
    if isinstance(first, nn.Linear):
        return Fused(_linear(torch.cat([member.weight.detach() for member in members]), bias), sizes)
    packed = torch.cat([member.packed for member in members])
    absmax = torch.cat([member.absmax for member in members], dim=-1)
    whole: QuantLinear4 | QuantLinear8
    if isinstance(first, GroupedLinear4):
        weight = Weight4(n, k, first.blocksize, packed, absmax, first.code)
        shift = None if first.shift is None else torch.cat([member.shift for member in members])
        whole = GroupedLinear4(weight, bias, first.compute_dtype, first.saved, order=first.order, shift=shift)
    elif isinstance(first, QuantLinear4):
        nested = _join_nested([member.quantised for member in members])
        weight = Weight4(n, k, first.blocksize, packed, absmax, first.code, nested)
        whole = QuantLinear4(weight, bias, first.compute_dtype, first.saved)
    else:
        whole = QuantLinear8(Weight8(n, k, packed, absmax), bias)
    return Fused(whole, sizes)


def _join_nested(weights: list[Weight4]) -> Nested | None:
    nested = [(weight.nested, weight.n) for weight in weights if weight.nested is not None]
    if not nested:
        return None
    rows = gcd(*(n for _, n in nested))  # as many to each offset, so that kernels find one by dividing
    offset = torch.cat([part.offset.expand(n // rows) for part, n in nested])
    return Nested(torch.cat([part.absmax for part, _ in nested]), nested[0][0].code, offset)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    whole = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta", dtype=weight.dtype)
    whole.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        whole.bias = nn.Parameter(bias, requires_grad=False)
    return whole


def _rows4(weight: Weight4, rows: slice) -> Weight4:
    packed = weight.packed[rows.start // 16 : rows.stop // 16]
    absmax = weight.absmax[:, rows]
    code = weight.code.clone()  # a checkpoint's tensors share no memory: `save_pretrained` refuses such
    nested = _rows_nested(weight, weight.nested, rows) if weight.nested else None
    return Weight4(rows.stop - rows.start, weight.k, weight.blocksize, packed, absmax, code, nested)


def _rows_nested(weight: Weight4, nested: Nested, rows: slice) -> Nested:
    start, stop = (row * weight.k // weight.blocksize for row in (rows.start, rows.stop))
    absmax = nested.absmax[start // NESTED_BLOCK : -(-stop // NESTED_BLOCK)]
    part = rows.start // weight.offset_rows
    return Nested(absmax, nested.code.clone(), nested.offset[part : part + 1])


def _rows8(weight: Weight8, rows: slice) -> Weight8:
    packed = weight.packed[rows.start // 16 : rows.stop // 16]
    return Weight8(rows.stop - rows.start, weight.k, packed, weight.absmax[rows])
