"""Asks the machine what it has. The one file whose answers depend on where it runs; all else plans with its values.

`python -m placement.probe` prints this machine's inventory as `--inventory` reads it; `--ray`, the Ray cluster's.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from placement.errors import PlacementError
from placement.hardware import Gpu, Inventory, Node, format_bytes
from placement.nvml import Machine, UnknownOrder, read_machine

_CPUINFO = Path("/proc/cpuinfo")
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
_BF16_FLAGS = {"avx512_bf16", "amx_bf16"}
_ACCELERATOR = "accelerator_type:"


def inventory() -> Inventory:
    """This machine: its visible CUDA devices, cores and available memory. Asks NVML, torch only where that fails."""
    machine = nvml_machine()
    gpus = machine.gpus if machine else cuda_gpus()
    return Inventory((Node("local", gpus, cpu_cores(), available_memory()),))


def cuda_gpus() -> tuple[Gpu, ...]:
    """The CUDA devices that torch can use in this process, in CUDA's order; empty without one. Imports torch.

    Where NVML is there (the package nvidia-ml-py), it is asked for the free bytes: no context is made, and one that
    this process has already is not counted as taken. Else torch is asked, which makes a context on every device first,
    so a plan for the same process reserves it twice: on the safe side.
    """
    import torch

    if not torch.cuda.is_available():
        return ()
    machine = nvml_machine()
    if machine and len(machine.gpus) == torch.cuda.device_count():
        return machine.gpus
    gpus = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        gpus.append(Gpu.of(torch.cuda.get_device_properties(index).name, total, free_bytes=free))
    return tuple(gpus)


def nvml_machine() -> Machine | None:
    """The NVIDIA GPUs that this process sees, asked of NVML without torch and without making a context.

    None where NVML can't say: nvidia-ml-py is not installed, there is no driver, or CUDA's order is not known.
    """
    try:
        import pynvml
    except ImportError:
        return None
    try:
        return read_machine(pynvml, os.environ, os.getpid(), _reserved_by_torch())
    except (pynvml.NVMLError, UnknownOrder):
        return None


def _reserved_by_torch() -> dict[int, int]:
    """Bytes per device in the hands of torch's allocator, where this process uses torch on CUDA already."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return {}
    return {index: torch.cuda.memory_reserved(index) for index in range(torch.cuda.device_count())}


def ray_inventory() -> Inventory:
    """The nodes of the Ray cluster that this process belongs to, or of the one that `ray.init("auto")` finds.

    Raises:
        PlacementError: there is no cluster, or a node's GPUs can't be told.
    """
    import ray

    if ray.is_initialized():
        return inventory_of(ray.nodes())
    try:
        ray.init("auto", log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        raise PlacementError(
            f"no Ray cluster answers ({error}); set RAY_ADDRESS, or write an inventory by hand"
        ) from None
    try:
        return inventory_of(ray.nodes())
    finally:
        ray.shutdown()


def inventory_of(nodes: Iterable[Mapping[str, Any]]) -> Inventory:
    """The inventory that `ray.nodes()` describes: nodes alive, with the GPUs that Ray schedules there.

    Ray knows how many GPUs a node has and the kind of the first, not their memory: that comes from the table of known
    GPUs, the smallest of a kind where there are several (A100).

    Raises:
        PlacementError: GPUs of an unknown kind, by node.
    """
    alive = sorted((node for node in nodes if node["Alive"]), key=lambda node: str(node["NodeName"]))
    return Inventory(tuple(_ray_node(node) for node in alive))


def _ray_node(node: Mapping[str, Any]) -> Node:
    resources: Mapping[str, float] = node["Resources"]
    count, name = int(resources.get("GPU", 0)), str(node["NodeName"])
    kinds = [key.removeprefix(_ACCELERATOR) for key in sorted(resources) if key.startswith(_ACCELERATOR)]
    if count and len(kinds) != 1:
        raise PlacementError(
            f"Ray node {name} has {count} GPUs and names {' and '.join(kinds) or 'no kind'} of them; "
            "give it one accelerator_type, or write an inventory by hand"
        )
    try:
        gpus = (Gpu.of(kinds[0], accelerator_type=kinds[0]),) * count if count else ()
    except PlacementError as error:
        raise PlacementError(f"Ray node {name}: {error}; write an inventory by hand") from None
    return Node(name, gpus, int(resources.get("CPU", 0)), int(resources.get("memory", 0)))


def cpu_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_memory(meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP) -> int:
    """Bytes of main memory that can be taken without swapping, container limit included.

    Raises:
        PlacementError: the system does not say (not Linux).
    """
    try:
        lines = meminfo.read_text(encoding="ascii").splitlines()
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        available = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        raise PlacementError(f"{meminfo} does not say how much memory is available; give sizes by hand") from None
    left = _cgroup_left(cgroup)
    return available if left is None else min(available, left)


def _cgroup_left(cgroup: Path) -> int | None:
    """What the container's limit leaves (cgroup v2), or None where there is no limit."""
    try:
        limit = (cgroup / "memory.max").read_text(encoding="ascii").strip()
        used = (cgroup / "memory.current").read_text(encoding="ascii").strip()
    except OSError:
        return None
    return max(0, int(limit) - int(used)) if limit.isdigit() else None


def computes_bf16_natively(cpuinfo: Path = _CPUINFO) -> bool:
    """Whether the CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX); False where the system does not say."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    flags = next((line.partition(":")[2] for line in text.splitlines() if line.startswith("flags")), "")
    return not _BF16_FLAGS.isdisjoint(flags.split())


def inventory_text(inventory: Inventory) -> str:
    """An inventory in YAML, as `parse_inventory` reads it."""
    nodes = [
        {"name": node.name, "cpus": node.cpus, "memory": node.memory_bytes, "gpus": [_entry(gpu) for gpu in node.gpus]}
        for node in inventory.nodes
    ]
    return str(yaml.safe_dump({"nodes": nodes}, sort_keys=False))


def _entry(gpu: Gpu) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": gpu.name, "memory": gpu.memory_bytes}
    if gpu.free_bytes is not None:
        entry["free"] = gpu.free_bytes
    if gpu.accelerator_type is not None:
        entry["accelerator_type"] = gpu.accelerator_type
    return entry


def _remarks(machine: Machine) -> Iterable[str]:
    """What an inventory has no place for, as comments: driver, ids, free memory, links."""
    yield f"# NVIDIA driver {machine.driver}"
    for index, (gpu, uuid, links) in enumerate(zip(machine.gpus, machine.uuids, machine.links, strict=True)):
        free = format_bytes(gpu.usable_bytes)
        to = ", ".join(f"{other}: {link}" for other, link in enumerate(links) if other != index)
        yield f"# {index}: {uuid}, {free} free" + (f"; links to {to}" if to else "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print an inventory; the exit code: 0, or 2 with one line on stderr."""
    parser = argparse.ArgumentParser(prog="placement.probe", description="What GPUs there are, as YAML.")
    parser.add_argument("--ray", action="store_true", help="of the Ray cluster instead of this machine")
    options = parser.parse_args(arguments)
    try:
        found = ray_inventory() if options.ray else inventory()
    except PlacementError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    machine = None if options.ray else nvml_machine()
    print("\n".join((*(_remarks(machine) if machine else ()), inventory_text(found))), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
