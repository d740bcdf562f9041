"""What modules hold on a device, and each layer's share of it in one allocation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from placement.arena import layout


def resident_tensors(modules: Iterable[nn.Module]) -> dict[tuple[int, int], list[Tensor]]:
    """Parameters, buffers and quantisation state held by `modules`, by address and size in bytes: the tensors of one
    entry are the same memory."""
    found: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
    for module in modules:
        for tensor in _held(module):
            if tensor.numel():
                found[tensor.data_ptr(), tensor.nbytes].append(tensor)
    return dict(found)


def resident_bytes(modules: Iterable[nn.Module]) -> int:
    """Their sum, shared memory counted once."""
    return sum(size for _, size in resident_tensors(modules))


@torch.no_grad()
def move_to_arena(module: nn.Module) -> int:
    """Move all that `module` holds into one new allocation, each tensor contiguous and at a multiple of `ALIGNMENT`.

    The tensors stay the objects that they are, so whoever refers to one (a parameter, bitsandbytes' state) refers to
    its new place. What they leave is freed as they move, so memory peaks at the arena's bytes above what was held.

    Returns:
        Bytes of the allocation.

    Raises:
        ValueError: the module is on several devices.
    """
    found = resident_tensors([module])
    devices = {tensors[0].device for tensors in found.values()}
    if len(devices) > 1:
        raise ValueError(f"a layer in one allocation must be on one device, not {', '.join(sorted(map(str, devices)))}")
    offsets, total = layout(size for _, size in found)
    arena = torch.empty(total, dtype=torch.uint8, device=next(iter(devices), None))
    for offset, ((_, size), tensors) in zip(offsets, found.items(), strict=True):
        place = arena[offset : offset + size]
        place.view(tensors[0].dtype).view(tensors[0].shape).copy_(tensors[0])
        for tensor in tensors:
            tensor.data = place.view(tensor.dtype).view(tensor.shape)
    return total


def _held(root: nn.Module) -> Iterator[Tensor]:
    yield from root.buffers()
    for parameter in root.parameters():
        yield parameter
        yield from _attributes(parameter)  # int8: the weight's scales, and its data by another name
        state = getattr(parameter, "quant_state", None)
        while state is not None:  # 4 bits, and of the scales where they are quantised too
            yield from _attributes(state)
            state = getattr(state, "state2", None)
    for module in root.modules():
        yield from _attributes(getattr(module, "state", None))  # an int8 linear's, once it has run


def _attributes(of: Any) -> Iterator[Tensor]:
    return (value for value in getattr(of, "__dict__", {}).values() if isinstance(value, Tensor))
