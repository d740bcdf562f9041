"""What GPTQ and AWQ store of a linear, unpacked. Its weight is scale[g] * (code - zero[g]), g the group of the input.

Codes and zeros are packed into int32:

    gptq    codes along the inputs, zeros along the outputs and less one in the older format, g_idx names the groups
    awq     both along the outputs, eight at a time in the order 0 2 4 6 1 3 5 7 from the lowest bits
"""

from __future__ import annotations

import torch
from torch import Tensor

_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word the outputs 0 to 7 are."""


def gptq_codes(qweight: Tensor, bits: int) -> Tensor:
    """int32 [in*bits/32, out] -> int32 [in, out]."""
    return _unpack(qweight.t(), bits).t()


def gptq_zeros(qzeros: Tensor, bits: int, *, less_one: bool) -> Tensor:
    """int32 [groups, out*bits/32] -> int32 [groups, out]; `less_one`: each is stored less one."""
    return _unpack(qzeros, bits) + int(less_one)


def awq_codes(words: Tensor) -> Tensor:
    """Codes or zeros: int32 [rows, out/8] -> int32 [rows, out]."""
    return _unpack(words, 4).view(len(words), -1, 8)[..., _AWQ_PLACES].flatten(1)


def _unpack(words: Tensor, bits: int) -> Tensor:
    """int32 [rows, words] -> int32 [rows, words * 32 / bits], the lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    return ((words[..., None] >> shifts) & ((1 << bits) - 1)).flatten(-2)
