"""GPUs and nodes as frozen values, and the ways people write them down.

Text `2x24GiB,1x80GiB`, YAML and JSON (`{"gpus": [{"name": "L4", "memory": "24GB", "count": 2}]}`).
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

from placement.errors import PlacementError

DeviceType = Literal["cuda", "cpu"]

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{letter}B": 1000**power for power, letter in enumerate("KMGT", start=1)}
_UNITS |= {f"{letter}IB": 1024**power for power, letter in enumerate("KMGT", start=1)}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")
_GROUP = re.compile(r"(?:(\d+)\s*[x*]\s*)?(\d+(?:\.\d+)?\s*[A-Za-z]+)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Gpu:
    """One accelerator, or one virtual device on the CPU."""

    name: str
    memory_bytes: int
    """All memory of the device."""
    free_bytes: int | None = None
    """What was free when it was probed (other tenants, MIG); None: all of it."""
    speed: int = 1
    """Relative speed; only the ratios between the devices of one plan matter."""
    device_type: DeviceType = "cuda"

    def __post_init__(self) -> None:
        if self.memory_bytes <= 0 or self.speed <= 0:
            raise PlacementError(f"{self.name}: memory and speed must be positive, got {self}")
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


def parse_gpus(text: str, *, device_type: DeviceType = "cuda") -> tuple[Gpu, ...]:
    """GPUs of `"2x24GiB,1x80GiB"` or `"24GiB"`, in the order written, named `gpu0`, `gpu1`, ... (`cpu0` on the CPU).

    Raises:
        PlacementError: anything else, or a count of 0.
    """
    sizes: list[int] = []
    for part in text.split(","):
        match = _GROUP.fullmatch(part.strip())
        if match is None or match[1] == "0":
            raise PlacementError(f"GPUs {text!r}: write count x size, such as 2x24GiB,1x80GiB")
        sizes += [parse_bytes(match[2])] * int(match[1] or 1)
    prefix = "gpu" if device_type == "cuda" else "cpu"
    return tuple(Gpu(f"{prefix}{i}", size, device_type=device_type) for i, size in enumerate(sizes))


def virtual_cpu_devices(sizes: tuple[str | int, ...]) -> tuple[Gpu, ...]:
    """Virtual devices `cpu0`, `cpu1`, ... with byte budgets: stages on a machine without a GPU."""
    return tuple(Gpu(f"cpu{i}", parse_bytes(size), device_type="cpu") for i, size in enumerate(sizes))


def parse_inventory(text: str) -> Inventory:
    """An inventory written in YAML (JSON is YAML too), by node or, for one machine, as a bare list of GPUs.

        nodes:
        - name: a
          gpus: [{name: L4, memory: 24GB, count: 2, speed: 3}]

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
    return Inventory(tuple(_node(entry, f"nodes[{i}]") for i, entry in enumerate(data["nodes"])))


def _node(entry: Any, where: str) -> Node:
    _expect_keys(entry, where, {"gpus"}, {"name", "cpus", "memory"})
    if not isinstance(entry["gpus"], list):
        raise PlacementError(f"{where}.gpus must be a list")
    gpus = tuple(gpu for i, g in enumerate(entry["gpus"]) for gpu in _gpus(g, f"{where}.gpus[{i}]"))
    cpus, memory = _whole(entry, "cpus", where, default=0), parse_bytes(entry.get("memory", 0))
    return Node(str(entry.get("name", where)), gpus, cpus, memory)


def _gpus(entry: Any, where: str) -> tuple[Gpu, ...]:
    _expect_keys(entry, where, {"memory"}, {"name", "count", "speed", "free", "device_type"})
    kind = entry.get("device_type", "cuda")
    if kind not in ("cuda", "cpu"):
        raise PlacementError(f"{where}.device_type must be cuda or cpu, got {kind!r}")
    gpu = Gpu(
        name=str(entry.get("name", "gpu")),
        memory_bytes=parse_bytes(entry["memory"]),
        free_bytes=parse_bytes(entry["free"]) if "free" in entry else None,
        speed=_whole(entry, "speed", where, default=1),
        device_type=kind,
    )
    return (gpu,) * _whole(entry, "count", where, default=1)


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
