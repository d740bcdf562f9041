"""int8 weights as bitsandbytes rounds them, made on the device that they are on.

transformers takes each tensor that it quantises to int8 from its GPU back to main memory, converts it to float16 there,
and sends it to the GPU again: 19 s of loading 16 GB. The bytes are the same either way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from bitsandbytes import functional
from bitsandbytes.nn import modules
from torch import Tensor
from transformers import Conv1D
from transformers.integrations import bitsandbytes as integration

bitsandbytes: Any = modules

PART_ELEMENTS = 2**24
"""Weights that are there in float16 at once, 32 MiB of them. A row is rounded by itself, so any number of rows does."""


@torch.no_grad()
def int8_parameter(weight: Tensor) -> Any:
    """A weight [n, k] as `bitsandbytes.nn.Int8Params` on the same device: int8 [n, k], and float32 [n] as `SCB`.

    Beside weight and result there is never more than a part in float16.
    """
    n, k = weight.shape
    rounded = torch.empty(n, k, dtype=torch.int8, device=weight.device)
    scales = torch.empty(n, dtype=torch.float32, device=weight.device)
    rows = max(1, PART_ELEMENTS // max(1, k))
    for first in range(0, n, rows):
        part = slice(first, first + rows)
        half = weight[part].to(torch.float16).contiguous()
        rounded[part], scales[part], _ = functional.int8_vectorwise_quant(half)
        del half  # before the next is made
    return bitsandbytes.Int8Params(rounded, requires_grad=False, has_fp16_weights=False, CB=rounded, SCB=scales)


@contextmanager
def quantising_in_place() -> Iterator[None]:
    """Let `from_pretrained` quantise to int8 on the device that a tensor was read to."""
    kind: Any = integration.Bnb8bitQuantize
    own = kind.convert
    kind.convert = _convert
    try:
        yield
    finally:
        kind.convert = own


def _convert(_: Any, input_dict: dict[str, Any], *, model: Any, **__: Any) -> dict[str, Any]:
    """Name -> parameter, as transformers' own operation."""
    return {name: int8_parameter(_as_linear(model, name, value)) for name, value in input_dict.items()}


def _as_linear(model: Any, name: str, value: Tensor | list[Tensor]) -> Tensor:
    """[out, in]; `Conv1D` of old models stores the transpose."""
    weight = value[0] if isinstance(value, list) else value
    linear: Any = model.get_submodule(name.rpartition(".")[0])
    return weight.T if issubclass(linear.source_cls, Conv1D) else weight
