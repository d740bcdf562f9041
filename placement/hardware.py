"""GPUs and nodes as frozen values, and the ways people write them down.

Text `2xH100,1x24GiB`, YAML and JSON (`{"gpus": [{"name": "L4", "count": 2}]}`). What a name does not say and nobody
gives (bandwidth, FLOP/s) is estimated by `placement.cards`.
Sizes in decimal units (kB, MB, GB, TB) are powers of 1000, in binary ones (KiB, MiB, GiB, TiB) powers of 1024,
as in `accelerate`'s max_memory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

import yaml

from placement.cards import CARDS, GB, TFLOPS, find_card, rates
from placement.errors import PlacementError

DeviceType = Literal["cuda", "cpu"]

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{letter}B": 1000**power for power, letter in enumerate("KMGT", start=1)}
_UNITS |= {f"{letter}IB": 1024**power for power, letter in enumerate("KMGT", start=1)}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")
_GROUP = re.compile(r"(?:(\d+)\s*[x*]\s*)?(\w[\w. -]*)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Gpu:
    """One accelerator, or one virtual device on the CPU."""

    name: str
    memory_bytes: int
    """All memory of the device."""
    free_bytes: int | None = None
    """What was free when it was probed (other tenants, MIG); None: all of it."""
    speed: int = 1
    """Relative speed, by which the solver balances stages; only the ratios between the devices of one plan matter.
    `Gpu.of` takes the GB/s of the memory, as decoding is bound by it."""
    device_type: DeviceType = "cuda"
    bandwidth: int = 0
    """Bytes/s of its memory; 0: not known."""
    flops: int = 0
    """Dense 16-bit FLOP/s; 0: not known."""
    accelerator_type: str | None = None
    """Ray's name of its kind, which a replica can ask for; None: not known."""

    @classmethod
    def of(
        cls,
        name: str,
        memory_bytes: int | None = None,
        *,
        free_bytes: int | None = None,
        speed: int | None = None,
        bandwidth: int | None = None,
        flops: int | None = None,
        accelerator_type: str | None = None,
    ) -> Gpu:
        """A CUDA device with what its name and memory tell about it; what is given wins.

        Raises:
            PlacementError: no memory is given, and the name is not known.
        """
        card = find_card(name, memory_bytes)
        if memory_bytes is None:
            if card is None:
                raise PlacementError(f"GPU {name!r} is not known: give its memory, or one of {known_names()}")
            memory_bytes = card.memory_bytes
        known_bandwidth, known_flops = rates(name, memory_bytes)
        bandwidth = known_bandwidth if bandwidth is None else bandwidth
        return cls(
            name=name,
            memory_bytes=memory_bytes,
            free_bytes=free_bytes,
            speed=max(1, bandwidth // GB) if speed is None else speed,
            bandwidth=bandwidth,
            flops=known_flops if flops is None else flops,
            accelerator_type=accelerator_type or (card.accelerator_type if card else None),
        )

    def __post_init__(self) -> None:
        if self.memory_bytes <= 0 or self.speed <= 0:
            raise PlacementError(f"{self.name}: memory and speed must be positive, got {self}")
        if self.bandwidth < 0 or self.flops < 0:
            raise PlacementError(f"{self.name}: bandwidth and flops can't be negative, got {self}")
        if self.free_bytes is not None and not 0 <= self.free_bytes <= self.memory_bytes:
            raise PlacementError(f"{self.name}: free_bytes must be between 0 and memory_bytes, got {self.free_bytes}")

    @property
    def usable_bytes(self) -> int:
        """What a plan may use: the free bytes when they are known, else all."""
        return self.memory_bytes if self.free_bytes is None else self.free_bytes


@dataclass(frozen=True, slots=True)
class Node:
    """One machine. `cpus` counts cores, `memory_bytes` is its main memory; 0 where nobody asked."""

    name: str
    gpus: tuple[Gpu, ...]
    cpus: int = 0
    memory_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Inventory:
    """All machines a plan may use."""

    nodes: tuple[Node, ...]

    @property
    def gpus(self) -> tuple[Gpu, ...]:
        """Every GPU, node by node."""
        return tuple(gpu for node in self.nodes for gpu in node.gpus)


def parse_bytes(size: str | int) -> int:
    """Bytes of `"600MB"`, `"24GiB"`, `"1.5 GB"`, `"1000"` or a plain integer; a fraction of a byte is dropped.

    Raises:
        PlacementError: unknown unit, negative or empty size.
    """
    if isinstance(size, bool) or not isinstance(size, str | int):
        raise PlacementError(f"size {size!r}: give bytes, or a number with a unit such as 600MB or 24GiB")
    match = _SIZE.fullmatch(str(size).strip())
    if match is None or match[2].upper() not in _UNITS:
        raise PlacementError(f"size {size!r}: give bytes, or a number with a unit such as 600MB or 24GiB")
    # Decimal, because 0.1 * 10**12 in binary floating point is not a whole number of bytes.
    return int(Decimal(match[1]) * _UNITS[match[2].upper()])


def format_bytes(count: int) -> str:
    """`count` in the largest decimal unit that keeps it above one, to three digits or so: 563 kB, 1.28 GB."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if abs(count) >= size:
            scaled = count / size
            return f"{scaled:.2f} {unit}" if abs(scaled) < 10 else f"{scaled:.1f} {unit}"
    return f"{count} B"


def known_names() -> str:
    """The kinds of GPU that can be named without their memory, for messages."""
    return ", ".join(card.name.replace(" ", "-") for card in CARDS)


def parse_gpus(text: str, *, device_type: DeviceType = "cuda") -> tuple[Gpu, ...]:
    """GPUs of `"2xH100,1x24GiB"` or `"L4"`, in the order written, each named as written (`cpu0`, ... on the CPU).

    Raises:
        PlacementError: anything else, or a count of 0.
    """
    if device_type == "cpu":
        return virtual_cpu_devices(tuple(size for count, size in _groups(text) for _ in range(count)))
    return tuple(gpu for count, what in _groups(text) for gpu in (_named_or_sized(what),) * count)


def _groups(text: str) -> list[tuple[int, str]]:
    groups = []
    for part in text.split(","):
        match = _GROUP.fullmatch(part.strip())
        if match is None or match[1] == "0":
            raise PlacementError(f"GPUs {text!r}: write count x size or name, such as 2x24GiB,1xH100")
        groups.append((int(match[1] or 1), match[2]))
    return groups


def _named_or_sized(what: str) -> Gpu:
    if find_card(what) is not None:
        return Gpu.of(what)
    match = _SIZE.fullmatch(what)
    if match is None or not match[2] or match[2].upper() not in _UNITS:
        raise PlacementError(f"GPU {what!r} is neither a size such as 24GiB nor one of {known_names()}")
    return Gpu.of(what, parse_bytes(what))


def virtual_cpu_devices(sizes: tuple[str | int, ...]) -> tuple[Gpu, ...]:
    """Virtual devices `cpu0`, `cpu1`, ... with byte budgets: stages on a machine without a GPU."""
    return tuple(Gpu(f"cpu{i}", parse_bytes(size), device_type="cpu") for i, size in enumerate(sizes))


def parse_inventory(text: str) -> Inventory:
    """An inventory written in YAML (JSON is YAML too), by node or, for one machine, as a bare list of GPUs.

        nodes:
        - name: a
          gpus: [{name: L4, count: 2}]
        - name: b
          gpus: [{name: mine, memory: 24GiB, free: 20GiB, bandwidth: 900GB, tflops: 120, accelerator_type: X}]

    `memory` may be left out where the name is known, `bandwidth` is per second. `speed` (a ratio) is for all GPUs or
    none.

    Raises:
        PlacementError: not YAML, a wrong key (by name), or a wrong value.
    """
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise PlacementError(f"inventory is not YAML or JSON: {' '.join(str(error).split())}") from None
    if isinstance(data, Mapping) and "gpus" in data:
        data = {"nodes": [{"name": "local", **data}]}
    _expect_keys(data, "inventory", {"nodes"})
    if not isinstance(data["nodes"], list):
        raise PlacementError("inventory: nodes must be a list")
    nodes = tuple(_node(entry, f"nodes[{i}]") for i, entry in enumerate(data["nodes"]))
    if len({"speed" in entry for node in data["nodes"] for entry in node["gpus"]}) > 1:
        raise PlacementError("inventory: speed is given for some GPUs only; give it for all, or leave it out")
    if len({node.name for node in nodes}) < len(nodes):
        raise PlacementError("inventory: two nodes have one name; give each its own")
    return Inventory(nodes)


def _node(entry: Any, where: str) -> Node:
    _expect_keys(entry, where, {"gpus"}, {"name", "cpus", "memory"})
    if not isinstance(entry["gpus"], list):
        raise PlacementError(f"{where}.gpus must be a list")
    gpus = tuple(gpu for i, g in enumerate(entry["gpus"]) for gpu in _gpus(g, f"{where}.gpus[{i}]"))
    cpus, memory = _whole(entry, "cpus", where, default=0), parse_bytes(entry.get("memory", 0))
    return Node(str(entry.get("name", where)), gpus, cpus, memory)


def _gpus(entry: Any, where: str) -> tuple[Gpu, ...]:
    kind = entry.get("device_type", "cuda") if isinstance(entry, Mapping) else "cuda"
    if kind not in ("cuda", "cpu"):
        raise PlacementError(f"{where}.device_type must be cuda or cpu, got {kind!r}")
    common = {"name", "memory", "count", "free", "device_type", "speed"}
    _expect_keys(
        entry, where, set(), common | ({"bandwidth", "tflops", "accelerator_type"} if kind == "cuda" else set())
    )
    if "memory" not in entry and (kind == "cpu" or "name" not in entry):
        raise PlacementError(f"{where}: memory is missing")
    gpu = _cpu_device(entry, where) if kind == "cpu" else _cuda_device(entry, where)
    return (gpu,) * _whole(entry, "count", where, default=1)


def _cpu_device(entry: Mapping[str, Any], where: str) -> Gpu:
    return Gpu(
        name=str(entry.get("name", "cpu")),
        memory_bytes=parse_bytes(entry["memory"]),
        free_bytes=parse_bytes(entry["free"]) if "free" in entry else None,
        speed=_whole(entry, "speed", where, default=1),
        device_type="cpu",
    )


def _cuda_device(entry: Mapping[str, Any], where: str) -> Gpu:
    return Gpu.of(
        name=str(entry.get("name", "gpu")),
        memory_bytes=parse_bytes(entry["memory"]) if "memory" in entry else None,
        free_bytes=parse_bytes(entry["free"]) if "free" in entry else None,
        speed=_whole(entry, "speed", where, default=1) if "speed" in entry else None,
        bandwidth=parse_bytes(entry["bandwidth"]) if "bandwidth" in entry else None,
        flops=_whole(entry, "tflops", where, default=0) * TFLOPS if "tflops" in entry else None,
        accelerator_type=str(entry["accelerator_type"]) if "accelerator_type" in entry else None,
    )


def _whole(entry: Mapping[str, Any], key: str, where: str, *, default: int) -> int:
    value = entry.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise PlacementError(f"{where}.{key} must be a whole number, got {value!r}")
    return value


def _expect_keys(entry: Any, where: str, required: set[str], optional: set[str] | None = None) -> None:
    allowed = required | (optional or set())
    if not isinstance(entry, Mapping):
        raise PlacementError(f"{where} must be a mapping with {', '.join(sorted(allowed))}")
    if unknown := sorted(str(key) for key in entry.keys() - allowed):
        raise PlacementError(f"{where}: unknown key {', '.join(unknown)}; known are {', '.join(sorted(allowed))}")
    if missing := sorted(required - entry.keys()):
        raise PlacementError(f"{where}: {', '.join(missing)} is missing")
