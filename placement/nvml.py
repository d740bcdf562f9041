"""What NVML tells of a machine's NVIDIA GPUs: it needs no torch and makes no CUDA context on any of them.

The library (`pynvml`, of the package nvidia-ml-py) is handed in, so this file runs wherever a fake does.

A process numbers its devices as CUDA does, NVML by PCI address. `CUDA_VISIBLE_DEVICES` is followed as CUDA's
programming guide says: indices, UUIDs or their beginnings, up to the first that is no device. Where GPUs of several
kinds are chosen by index, CUDA puts the fastest first unless `CUDA_DEVICE_ORDER=PCI_BUS_ID`; what it takes for the
fastest is not documented, so the order is then not told (`UnknownOrder`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from placement.errors import PlacementError
from placement.hardware import Gpu

Link = Literal["self", "nvlink", "pcie", "host"]
"""How bytes go from one GPU to another: by NVLink, directly over PCIe, or by way of main memory."""


class UnknownOrder(PlacementError):
    """NVML can't tell in which order CUDA numbers the devices."""


@dataclass(frozen=True, slots=True)
class Machine:
    """The GPUs that a process sees, in the order in which CUDA numbers them."""

    driver: str
    gpus: tuple[Gpu, ...]
    uuids: tuple[str, ...]
    links: tuple[tuple[Link, ...], ...]
    """links[i][j]: from GPU i to GPU j."""


def read_machine(nvml: Any, environment: Mapping[str, str], pid: int, cached_bytes: Mapping[int, int]) -> Machine:
    """What the process `pid` sees.

    Free bytes include what the process holds itself, save `cached_bytes`: a plan for this process counts its context
    once, as a reserve. Where NVML lists other process ids than ours (a container's), they stay a little too low.

    Args:
        nvml: the module `pynvml`, or a fake.
        environment: for CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER.
        pid: of the process that asks.
        cached_bytes: per device index, bytes in the process that are not the CUDA context's: torch's reserved memory.

    Raises:
        UnknownOrder: see the module.
        nvml.NVMLError: no driver, no permission.
    """
    nvml.nvmlInit()
    try:
        handles = _visible(nvml, environment)
        return Machine(
            driver=_text(nvml.nvmlSystemGetDriverVersion()),
            gpus=tuple(_gpu(nvml, handle, pid, cached_bytes.get(i, 0)) for i, handle in enumerate(handles)),
            uuids=tuple(_text(nvml.nvmlDeviceGetUUID(handle)) for handle in handles),
            links=tuple(tuple(_link(nvml, a, b, same=a is b) for b in handles) for a in handles),
        )
    finally:
        nvml.nvmlShutdown()


def _gpu(nvml: Any, handle: Any, pid: int, cached: int) -> Gpu:
    # Version 2 has apart what the driver keeps for itself, which CUDA does not count as the device's memory.
    memory = nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
    total = memory.total - memory.reserved
    free = min(total, memory.free + max(0, _held(nvml, handle, pid) - cached))
    return Gpu.of(_text(nvml.nvmlDeviceGetName(handle)), total, free_bytes=free)


def _held(nvml: Any, handle: Any, pid: int) -> int:
    """Bytes that a process holds on a device; 0 where the driver does not say (MIG, no permission)."""
    try:
        processes = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except (nvml.NVMLError_NotSupported, nvml.NVMLError_NoPermission):
        return 0
    return sum(process.usedGpuMemory or 0 for process in processes if process.pid == pid)


def _link(nvml: Any, source: Any, target: Any, *, same: bool) -> Link:
    if same:
        return "self"
    kinds: dict[Link, int] = {"nvlink": nvml.NVML_P2P_CAPS_INDEX_NVLINK, "pcie": nvml.NVML_P2P_CAPS_INDEX_WRITE}
    for kind, index in kinds.items():
        try:
            if nvml.nvmlDeviceGetP2PStatus(source, target, index) == nvml.NVML_P2P_STATUS_OK:
                return kind
        except nvml.NVMLError_NotSupported:
            continue  # this driver or device knows no such link
    return "host"


def _visible(nvml: Any, environment: Mapping[str, str]) -> list[Any]:
    """Handles in CUDA's order. CUDA shows a process one MIG device at most, and then nothing else."""
    devices = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    listed = environment.get("CUDA_VISIBLE_DEVICES")
    chosen = devices if listed is None else list(_listed(nvml, devices, listed.split(",")))
    by_index = listed is None or any(token.strip().isdigit() for token in listed.split(","))
    if by_index and chosen and environment.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID" and _kinds(nvml, devices) > 1:
        raise UnknownOrder(
            "this machine has GPUs of several kinds, which CUDA does not number as NVML does; "
            "set CUDA_DEVICE_ORDER=PCI_BUS_ID, or name the GPUs in CUDA_VISIBLE_DEVICES by UUID"
        )
    expanded = [mig for device in chosen for mig in _mig_devices(nvml, device)]
    return expanded[:1] or [device for device in chosen if not _is_split(nvml, device)]


def _listed(nvml: Any, devices: Sequence[Any], tokens: Sequence[str]) -> Iterator[Any]:
    for token in map(str.strip, tokens):
        if token.isdigit():
            found = devices[int(token) : int(token) + 1]
        elif token.startswith("MIG-"):
            found = _by_uuid(nvml, token)
        else:
            found = [
                d for d in devices if token.startswith("GPU-") and _text(nvml.nvmlDeviceGetUUID(d)).startswith(token)
            ]
        if len(found) != 1:
            return
        yield found[0]


def _by_uuid(nvml: Any, uuid: str) -> list[Any]:
    try:
        return [nvml.nvmlDeviceGetHandleByUUID(uuid)]
    except (nvml.NVMLError_NotFound, nvml.NVMLError_InvalidArgument):
        return []


def _mig_devices(nvml: Any, device: Any) -> list[Any]:
    """`device` itself where it is a MIG device, the MIG devices of a GPU that is split into some, else none."""
    if nvml.nvmlDeviceIsMigDeviceHandle(device):
        return [device]
    found = []
    for index in range(nvml.nvmlDeviceGetMaxMigDeviceCount(device) if _is_split(nvml, device) else 0):
        try:
            found.append(nvml.nvmlDeviceGetMigDeviceHandleByIndex(device, index))
        except nvml.NVMLError_NotFound:
            continue  # indices have gaps
    return found


def _is_split(nvml: Any, device: Any) -> bool:
    """Whether a GPU is in MIG mode; without MIG devices CUDA then has no use for it."""
    try:
        current, _ = nvml.nvmlDeviceGetMigMode(device)
    except nvml.NVMLError_NotSupported:
        return False
    return bool(current == nvml.NVML_DEVICE_MIG_ENABLE)


def _kinds(nvml: Any, devices: Sequence[Any]) -> int:
    return len({_text(nvml.nvmlDeviceGetName(device)) for device in devices})


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
