"""What the solver is asked, and checks that it makes sense: a model, devices with budgets, what must fit, and pins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import pairwise
from typing import Literal, Required, TypedDict, Unpack, get_args

from placement.cards import runs_flashinfer
from placement.errors import PlacementError
from placement.flashinfer import gpu_attention, stored_kv, why_not_flashinfer
from placement.footprint import Footprint
from placement.hardware import Gpu, Inventory, format_bytes, parse_bytes
from placement.kv import LayerKv, kv_dtype_name
from placement.reserve import CUDA_CONTEXT_BYTES
from placement.workload import Attention, Workload

Order = Literal["given", "best"]

LAST_RESORT = -1
"""In pins: the device of last resort, which is the last of the devices."""


@dataclass(frozen=True, slots=True)
class Demand:
    """The least that a plan must have room for."""

    context: int = 1
    """Tokens of one sequence."""
    requests: int = 1
    """Sequences at once ..."""
    length: int = 1
    """... of so many tokens each."""

    def blocks(self, block_size: int) -> int:
        """KV blocks that hold it."""
        return max(-(-self.context // block_size), self.requests * -(-self.length // block_size))

    def within(self, context: int) -> Demand:
        """The same with no sequence longer than `context`."""
        return Demand(min(self.context, context), self.requests, min(self.length, context))


@dataclass(frozen=True, slots=True)
class Question:
    """Everything that a split depends on."""

    footprint: Footprint
    devices: tuple[Gpu, ...]
    """In pipeline order, unless `order` is "best"."""
    budgets: tuple[int, ...]
    """Bytes per device, the CUDA context included."""
    workload: Workload
    demand: Demand = Demand()
    pins: tuple[int | None, ...] = ()
    """Per layer the index of the one device that may hold it, or None; empty: no layer is pinned."""
    order: Order = "given"
    """best: the devices may be used in any order."""
    last_resort: bool = False
    """The last device comes last in the pipeline, is used only when the others do not suffice, and then for as few
    layers as possible."""

    @property
    def least_blocks(self) -> int:
        """KV blocks that a plan must have."""
        return self.demand.blocks(self.workload.block_size)

    @property
    def attention(self) -> Attention:
        """What computes attention in the whole replica."""
        gpus = any(device.device_type == "cuda" for device in self.devices)
        return gpu_attention(self.footprint, self.workload) if gpus else "torch"

    @property
    def kv(self) -> tuple[LayerKv, ...]:
        """What each layer caches, as it is stored."""
        return stored_kv(self.footprint.geometry.kv, self.workload.kv_dtype, self.attention)


class Conditions(TypedDict, total=False):
    """What a caller may ask of a plan besides its goal."""

    block_size: Required[int]
    """Tokens per KV block."""
    max_batch_tokens: Required[int]
    """Token budget of one step."""
    max_sequences: Required[int]
    """Most sequences running at once."""
    max_context: int | None
    """Tokens of the longest sequence, prompt and output; default: what the model was made for."""
    max_memory: Mapping[int, str | int] | None
    """Cap per device index, bounding everything but the CUDA context."""
    dtype: str | None
    """Must be the footprint's, where given."""
    kv_dtype: str | None
    """Of the KV cache, "fp8" among them; default: the footprint's dtype."""
    attention: Attention | None
    """What computes attention on GPUs; default: FlashInfer, where it has kernels for the model and runs on them all."""
    min_context: int | None
    """One sequence of so many tokens must fit; default: one KV block must."""
    min_concurrency: int
    """So many sequences must fit at once ..."""
    concurrent_context: int | None
    """... of so many tokens each; default: of `min_context`, else of `max_context` tokens."""
    pins: Mapping[str, int | str] | None
    """Module name -> index of the device that it must live on, or "cpu"; "model.layers" pins all that it begins."""
    allow_cpu: str | int | None
    """Bytes of main memory for a last stage on the CPU, used only when the GPUs alone do not suffice, and then for as
    few layers as possible."""
    order: Order
    """"best" lets the pipeline pass the devices in any order; default: as they are given."""


def ask(footprint: Footprint, gpus: Inventory | Sequence[Gpu], **conditions: Unpack[Conditions]) -> Question:
    """The question that `conditions` put.

    Raises:
        PlacementError: a value that makes no sense; the message names it.
    """
    devices = tuple(gpus.gpus if isinstance(gpus, Inventory) else gpus)
    if any(device.device_type == "cuda" for device in devices):
        footprint = footprint.on_gpus()
    dtype, order = conditions.get("dtype"), conditions.get("order", "given")
    if dtype is not None and dtype != footprint.dtype:
        raise PlacementError(f"the footprint was weighed with dtype {footprint.dtype}, not {dtype}")
    if order not in get_args(Order):
        raise PlacementError(f"order {order!r} is not known; use one of {', '.join(get_args(Order))}")
    given = budgets(devices, conditions.get("max_memory") or {})
    workload = _workload(footprint, devices, conditions)
    _check_attention(footprint, workload, devices)
    cpu = conditions.get("allow_cpu")
    if cpu is not None:
        size = parse_bytes(cpu)
        devices, given = (*devices, Gpu("cpu", size, device_type="cpu")), (*given, size)
    resort = cpu is not None
    return Question(
        footprint=footprint,
        devices=devices,
        budgets=given,
        workload=workload,
        demand=demand(
            workload,
            conditions.get("min_context"),
            conditions.get("min_concurrency", 1),
            conditions.get("concurrent_context"),
        ),
        pins=pin_layers(footprint, conditions.get("pins") or {}, len(devices), last_resort=resort, order=order),
        order=order,
        last_resort=resort,
    )


def _workload(footprint: Footprint, devices: tuple[Gpu, ...], conditions: Conditions) -> Workload:
    made_for = footprint.geometry.max_context
    wished = conditions.get("max_context")
    context = made_for if wished is None else wished
    if context > made_for:
        longer = footprint.geometry.stretched_to
        why = "" if longer is None else f", and longrope's other frequencies, up to {longer}, are not served"
        raise PlacementError(
            f"max_context is {context} tokens, but {footprint.model} was made for {made_for}{why}; lower it"
        )
    sizes = conditions["block_size"], conditions["max_batch_tokens"], conditions["max_sequences"]
    names = "block_size", "max_batch_tokens", "max_sequences", "max_context"
    for name, size in zip(names, (*sizes, context), strict=True):
        if size < 1:
            raise PlacementError(f"{name} is {size}, but it must be at least 1")
    kv_dtype = kv_dtype_name(conditions.get("kv_dtype") or footprint.dtype)
    attention = conditions.get("attention") or ("torch" if _without_flashinfer(devices) else None)
    return Workload(*sizes, context, kv_dtype, attention)


def _without_flashinfer(devices: tuple[Gpu, ...]) -> list[str]:
    """The GPUs that FlashInfer does not run on; one of them in a replica, and none of the others has it either."""
    gpus = [gpu for gpu in devices if gpu.device_type == "cuda"]
    return [gpu.name for gpu in gpus if not runs_flashinfer(gpu.name, gpu.memory_bytes)]


def _check_attention(footprint: Footprint, workload: Workload, devices: tuple[Gpu, ...]) -> None:
    wished = workload.attention
    if wished not in (None, *get_args(Attention)):
        raise PlacementError(f"attention {wished!r} is not known; use one of {', '.join(get_args(Attention))}")
    if wished != "flashinfer":
        return
    if all(gpu.device_type == "cpu" for gpu in devices):
        raise PlacementError(
            "attention flashinfer needs a GPU, and all devices are virtual ones on the CPU; leave it out"
        )
    if without := _without_flashinfer(devices):
        raise PlacementError(f"attention flashinfer does not run on {without[0]}; use torch")
    if reason := why_not_flashinfer(footprint, workload):
        raise PlacementError(f"attention flashinfer does not serve {footprint.model}: {reason}; use torch")


def budgets(devices: tuple[Gpu, ...], max_memory: Mapping[int, str | int]) -> tuple[int, ...]:
    """What each device may hold in all. A cap bounds everything but the CUDA context; where cap and context together
    are more than the device has, what it has is the budget.

    Raises:
        PlacementError: no device, a cap for a device that isn't there, or a cap above what the device has.
    """
    if not devices:
        raise PlacementError("there is no device to plan for; give at least one GPU or virtual CPU device")
    if unknown := sorted(set(max_memory) - set(range(len(devices)))):
        raise PlacementError(f"max_memory names device {unknown[0]}, but there {_only(len(devices))}; leave it out")
    found = []
    for index, gpu in enumerate(devices):
        cap = parse_bytes(max_memory[index]) if index in max_memory else gpu.usable_bytes
        if cap > gpu.usable_bytes:
            raise PlacementError(
                f"max_memory gives device {index} ({gpu.name}) {format_bytes(cap)}, but {_has(gpu)}; "
                "lower the cap or leave it out"
            )
        context = CUDA_CONTEXT_BYTES if gpu.device_type == "cuda" else 0
        found.append(min(cap + context, gpu.usable_bytes))
    return tuple(found)


def _has(gpu: Gpu) -> str:
    if gpu.free_bytes is None:
        return f"it has {format_bytes(gpu.memory_bytes)}"
    return f"{format_bytes(gpu.free_bytes)} of its {format_bytes(gpu.memory_bytes)} are free"


def demand(workload: Workload, min_context: int | None, min_concurrency: int, concurrent_context: int | None) -> Demand:
    """The wish for room; `min_concurrency` sequences of `concurrent_context` tokens, else of `min_context` tokens, else
    of the longest context.

    Raises:
        PlacementError: a wish that the workload rules out.
    """
    length = concurrent_context or min_context or workload.max_context
    for name, tokens in (("min_context", min_context), ("concurrent_context", concurrent_context)):
        if tokens is not None and not 1 <= tokens <= workload.max_context:
            raise PlacementError(
                f"{name} is {tokens} tokens, but max_context is {workload.max_context}; it must be between 1 and that"
            )
    if min_concurrency < 1:
        raise PlacementError(f"min_concurrency is {min_concurrency}, but it must be at least 1")
    if min_concurrency > workload.max_sequences:
        raise PlacementError(
            f"min_concurrency is {min_concurrency}, but max_sequences is {workload.max_sequences}; "
            "raise max_sequences or lower min_concurrency"
        )
    if min_concurrency == 1 and concurrent_context is None:
        return Demand(context=min_context or 1)
    return Demand(min_context or 1, min_concurrency, length)


def pin_layers(
    footprint: Footprint, pins: Mapping[str, int | str], devices: int, *, last_resort: bool, order: Order
) -> tuple[int | None, ...]:
    """Pins of modules as pins of layers. A name pins every module that it is or begins ("model.layers": all layers).

    A module beside the layers (embedding, final norm, head) pins the layer on whose device it lives.

    Args:
        devices: how many there are, the last resort included.

    Raises:
        PlacementError: a module or device that isn't there, or pins that no pipeline in this order can keep.
    """
    if not pins:
        return ()
    homes = {layer.name: i for i, layer in enumerate(footprint.layers)}
    homes |= {module.name: i for i, module in footprint.beside}
    chosen: dict[int, tuple[str, int]] = {}
    for name, target in pins.items():
        device = _pinned_device(name, target, devices, last_resort)
        for layer in _pinned_layers(footprint, homes, name):
            other, there = chosen.setdefault(layer, (name, device))
            if there != device:
                raise PlacementError(
                    f"{name} is pinned to device {target} and {other} to device {pins[other]}, but the two live on one "
                    f"device, with layer {layer}; pin them alike"
                )
    _check_order(chosen, devices, order)
    return tuple(chosen[i][1] if i in chosen else None for i in range(len(footprint.layers)))


def _pinned_device(name: str, target: int | str, devices: int, last_resort: bool) -> int:
    """The index, or LAST_RESORT."""
    if target == "cpu" and last_resort:
        return LAST_RESORT
    if target == "cpu":
        raise PlacementError(f"{name} is pinned to the CPU, which may hold nothing; give allow_cpu bytes")
    gpus = devices - last_resort
    if isinstance(target, bool) or not isinstance(target, int) or not 0 <= target < gpus:
        raise PlacementError(f"{name} is pinned to device {target!r}, but there {_only(gpus)}")
    return target


def _only(devices: int) -> str:
    return "is only device 0" if devices == 1 else f"are only devices 0 to {devices - 1}"


def _pinned_layers(footprint: Footprint, homes: Mapping[str, int], name: str) -> list[int]:
    layers = [layer for module, layer in homes.items() if module == name or module.startswith(f"{name}.")]
    if layers:
        return layers
    if any(module.name == name for module in footprint.with_role("shared")):
        raise PlacementError(f"{name} can't be pinned: every stage holds a copy of it")
    near = get_close_matches(name, homes, n=1)
    hint = f"did you mean {near[0]}?" if near else f"the units of placement are such as {next(iter(homes))}"
    raise PlacementError(f"pinned module {name} is not a unit of placement of {footprint.model}; {hint}")


def _check_order(chosen: Mapping[int, tuple[str, int]], devices: int, order: Order) -> None:
    """Every device's pins must be able to lie in one contiguous run, in pipeline order."""
    runs: list[tuple[str, int]] = []
    for layer in sorted(chosen):
        name, device = chosen[layer][0], chosen[layer][1] % devices
        if not runs or runs[-1][1] != device:
            runs.append((name, device))
    for (before, first), (after, second) in pairwise(runs):
        if order == "given" and second < first:
            raise PlacementError(
                f"{before} is pinned to device {first} and {after}, which runs after it, to device {second}: stages "
                f"follow the order of the devices; swap the pins, list the devices in another order, or give "
                f'order="best"'
            )
    if twice := next((name for i, (name, device) in enumerate(runs) if device in [d for _, d in runs[:i]]), None):
        raise PlacementError(
            f"{twice} is pinned to a device whose other pins lie before a module pinned elsewhere, but a stage is one "
            "run of layers; pin neighbours alike"
        )
