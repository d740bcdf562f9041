"""Small tensors from host to device without a wait: packed into pinned memory, one copy for all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
_ALIGN = 16


def upload(values: T, device: torch.device) -> T:
    """A dataclass with its tensors, and those of dataclasses in it, copied to `device`; all else stays as it is.

    The copy is on the device's current stream. Its pinned buffer returns to PyTorch's pool, which hands it out again
    only after the copy.
    """
    tensors = list(_tensors(values))
    if not tensors:
        return values
    staging = torch.empty(sum(map(_room, tensors)), dtype=torch.uint8, pin_memory=device.type == "cuda")
    for part, tensor in zip(_parts(staging, tensors), tensors, strict=True):
        part.copy_(tensor)
    there = staging.to(device, non_blocking=True)
    return _with_tensors(values, _parts(there, tensors))


def _tensors(values: DataclassInstance) -> Iterator[Tensor]:
    for field in fields(values):
        value = getattr(values, field.name)
        if isinstance(value, Tensor):
            yield value
        elif is_dataclass(value) and not isinstance(value, type):
            yield from _tensors(value)


def _with_tensors(values: T, tensors: Iterator[Tensor]) -> T:
    """A copy whose tensors are `tensors`, in the order in which `_tensors` finds them."""
    new: dict[str, Any] = {}
    for field in fields(values):
        value = getattr(values, field.name)
        if isinstance(value, Tensor):
            new[field.name] = next(tensors)
        elif is_dataclass(value) and not isinstance(value, type):
            new[field.name] = _with_tensors(value, tensors)
    return replace(values, **new)


def _parts(buffer: Tensor, like: list[Tensor]) -> Iterator[Tensor]:
    """Views of `buffer` with the dtypes and shapes of `like`, one after the other."""
    start = 0
    for tensor in like:
        yield buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        start += _room(tensor)


def _room(tensor: Tensor) -> int:
    return -(-tensor.nbytes // _ALIGN) * _ALIGN
