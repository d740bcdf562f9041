"""GPTQ's and AWQ's linears on the 4-bit kernels: their codes and scales as they are, nothing quantised a second time.

A weight is scale[g] * (code - zero[g]), g the group of the input. With m the middle code and the inputs of a group side
by side, that is what the 4-bit kernels compute, in blocks of a group and with the table code - m, and one more term:

    W x = (scale * (code - m)) x + (u * scale * (m - zero)) (s / u),    s[g] the sum of the group's x

The second product has a column for each group, and u keeps both of its factors well inside the range of float16
(`sum_unit`). Where all zeros are m (GPTQ's `sym`) it is 0, and left out. Under act-order the weight's columns are
sorted by group, and x is read in that order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deployments.engine.kernels import ops
from deployments.engine.kernels.modules import QuantLinear4, Saved4
from deployments.engine.kernels.weights import Weight4

NOT_SAVED = "a GPTQ or AWQ checkpoint that runs on GPUs is not written again: copy the one that it was loaded from"


def sum_unit(group_size: int) -> float:
    """In which unit the sum of a group's x is rounded to the compute dtype: about the root of the group's size.

    So the sum of x that vary around 0 is about as large as they are. In float16, a group of 28,672 has room for a mean
    of 511, and for scales of up to 36; the sum itself would overflow from a mean of 2.3 on. What is rounded is the mean
    alone, which is then multiplied by a power of two.
    """
    return group_size / _mean_factor(group_size)


def _mean_factor(group_size: int) -> int:
    return 1 << group_size.bit_length() // 2


class GroupedLinear4(QuantLinear4):
    """x [..., k] -> [..., n].

    Args:
        weight: in blocks of a group, the table code - m.
        order: int32 [k]: which input each column of the weight is for; None: as they are.
        shift: [n, groups] in the compute dtype: scale * (m - zero), times `sum_unit` of a group; None: 0.
    """

    order: Tensor | None
    shift: Tensor | None

    def __init__(
        self,
        weight: Weight4,
        bias: Tensor | None,
        compute_dtype: torch.dtype,
        saved: Saved4,
        *,
        order: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> None:
        super().__init__(weight, bias, compute_dtype, saved)
        self.mean_factor = _mean_factor(weight.blocksize)
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("shift", shift, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """In the compute dtype; the result has x's dtype."""
        given = x.dtype
        x = x.to(self.compute_dtype)
        if self.order is not None:
            x = x.index_select(-1, self.order)
        if self.shift is None:
            return super().forward(x).to(given)
        sums = x.view(*x.shape[:-1], self.shift.shape[1], -1).mean(-1).mul_(self.mean_factor)
        out: Tensor = ops.linear_4bit_shifted(
            x,
            self.packed,
            self.absmax,
            self.code,
            sums,
            self.shift,
            self.bias,
            self.out_features,
            self.in_features,
            self.blocksize,
        )
        return out.to(given)

    def why_not_fused(self, other: GroupedLinear4) -> str | None:
        """Why the two of one input can't be one product; None: they can."""
        orders = (self.order, other.order)
        if (orders[0] is None) != (orders[1] is None):
            return "some have their inputs in another order"
        if orders[0] is not None and orders[1] is not None and not torch.equal(orders[0], orders[1]):
            return "their inputs are in different orders"
        return None if (self.shift is None) == (other.shift is None) else "the zeros of some are the middle code"

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        raise NotImplementedError(NOT_SAVED)
