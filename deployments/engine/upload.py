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
    """A dataclass with its tensors, and those of dataclasses and tuples of them in it, copied to `device`; all else
    stays as it is.

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
    uploaded: T = _with_tensors(values, _parts(there, tensors))
    return uploaded


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif _holds_parts(value):
        for each in value:
            yield from _tensors(each)
    elif _is_instance(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))


def _with_tensors(value: Any, tensors: Iterator[Tensor]) -> Any:
    """A copy whose tensors are `tensors`, in the order in which `_tensors` finds them."""
    if isinstance(value, Tensor):
        return next(tensors)
    if _holds_parts(value):
        return tuple(_with_tensors(each, tensors) for each in value)
    if _is_instance(value):
        return replace(value, **{f.name: _with_tensors(getattr(value, f.name), tensors) for f in fields(value)})
    return value


def _holds_parts(value: Any) -> bool:
    return isinstance(value, tuple) and all(map(_is_instance, value))


def _is_instance(value: Any) -> bool:
    return is_dataclass(value) and not isinstance(value, type)


def _parts(buffer: Tensor, like: list[Tensor]) -> Iterator[Tensor]:
    """Views of `buffer` with the dtypes and shapes of `like`, one after the other."""
    start = 0
    for tensor in like:
        yield buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        start += _room(tensor)


def _room(tensor: Tensor) -> int:
    return -(-tensor.nbytes // _ALIGN) * _ALIGN
