"""Asks the machine what it has. The one file whose answers depend on where it runs; all else plans with its values."""

from __future__ import annotations

import os
from pathlib import Path

from placement.errors import PlacementError
from placement.hardware import Gpu, Inventory, Node

_CPUINFO = Path("/proc/cpuinfo")
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
_BF16_FLAGS = {"avx512_bf16", "amx_bf16"}


def inventory() -> Inventory:
    """This machine: its visible CUDA devices, cores and available memory."""
    return Inventory((Node("local", cuda_gpus(), cpu_cores(), available_memory()),))


def cuda_gpus() -> tuple[Gpu, ...]:
    """The CUDA devices that this process sees, in CUDA's order; empty without one. Imports torch.

    Free bytes are measured with this process's context already there, so a plan for the same process reserves the
    context twice: on the safe side. `speed` is the number of multiprocessors, the only figure that every driver
    gives; write an inventory to say better.
    """
    import torch

    if not torch.cuda.is_available():
        return ()
    gpus = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        properties = torch.cuda.get_device_properties(index)
        gpus.append(Gpu(properties.name, total, free_bytes=free, speed=properties.multi_processor_count))
    return tuple(gpus)


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
