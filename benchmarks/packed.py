"""Random linears as GPTQ and AWQ store them: `packed(config, out, inputs, ...)`.

All codes are equally likely, so weights are, in steps of a scale, -8 to 7 with a standard deviation of 4.6.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_CODES_DEVIATION = 4.6
_SYMMETRIC = 0x77777777
"""Eight zeros of 8, each stored less one."""


def packed(config: Mapping[str, Any], out: int, inputs: int, *, deviation: float, device: str) -> dict[str, Tensor]:
    """A checkpoint's tensors of a weight [out, inputs] of 4 bits, on the CPU.

    Args:
        config: the quantization_config.
        deviation: of the weights.
        device: where they are drawn.
    """
    groups = inputs // config["group_size"]
    awq = config["quant_method"] == "awq"
    shape = (inputs, out // 8) if awq else (inputs // 8, out)
    parts = {
        "qweight": torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device=device).cpu(),
        "qzeros": _zeros(groups, out) if awq else torch.full((groups, out // 8), _SYMMETRIC, dtype=torch.int32),
        "scales": (deviation / _CODES_DEVIATION * (0.75 + 0.5 * torch.rand(groups, out))).half(),
    }
    return parts if awq else parts | {"g_idx": _groups(inputs, config["group_size"], act_order=config["desc_act"])}


def _zeros(groups: int, out: int) -> Tensor:
    """int32 [groups, out/8]: eight zeros of 6 to 9 a word."""
    codes = torch.randint(6, 10, (groups, out // 8, 8))
    words = (codes << (4 * torch.arange(8))).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _groups(inputs: int, size: int, *, act_order: bool) -> Tensor:
    """int32 [inputs]; under act-order the same for all linears of so many inputs, as for those of one input."""
    groups = torch.arange(inputs, dtype=torch.int32) // size
    return groups[torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs))] if act_order else groups
