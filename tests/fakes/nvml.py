"""An NVML with made-up GPUs: the part of `pynvml` that `placement.nvml` uses, with its names and errors."""

from __future__ import annotations

from dataclasses import dataclass, field

GIB = 2**30


class NVMLError(Exception):
    """The base of the library's errors."""


class NVMLError_NotSupported(NVMLError):
    """The device has no such feature."""


class NVMLError_NotFound(NVMLError):
    """No such device."""


class NVMLError_InvalidArgument(NVMLError):
    """Not a device's name."""


class NVMLError_NoPermission(NVMLError):
    """Only root may know."""


@dataclass(frozen=True)
class Process:
    """A process on a device."""

    pid: int
    usedGpuMemory: int | None  # None: the driver does not say


@dataclass(frozen=True)
class Memory:
    """Bytes, as version 2 of the structure has them."""

    total: int
    reserved: int
    used: int

    @property
    def free(self) -> int:
        """What neither processes nor the driver hold."""
        return self.total - self.reserved - self.used


@dataclass(eq=False)
class FakeGpu:
    """A GPU or a MIG device."""

    name: str = "NVIDIA L4"
    uuid: str = "GPU-0"
    memory: Memory = Memory(24 * GIB, GIB, 0)
    processes: tuple[Process, ...] | None = ()
    """None: asking is not permitted."""
    split: tuple[FakeGpu | None, ...] | None = None
    """MIG devices by index, None where there is none; None as a whole: MIG is off."""
    has_mig: bool = True
    is_mig: bool = False


@dataclass
class FakeNvml:
    """`import pynvml`, with these GPUs in the machine in PCI order."""

    gpus: list[FakeGpu]
    nvlinks: set[tuple[int, int]] = field(default_factory=set)
    peers: set[tuple[int, int]] = field(default_factory=set)
    bytes_as_text: bool = False
    """Old releases return bytes."""
    open: int = 0

    NVML_P2P_CAPS_INDEX_WRITE = 1
    NVML_P2P_CAPS_INDEX_NVLINK = 2
    NVML_P2P_STATUS_OK = 0
    NVML_DEVICE_MIG_ENABLE = 1
    nvmlMemory_v2 = 0x02000028
    NVMLError = NVMLError
    NVMLError_NotSupported = NVMLError_NotSupported
    NVMLError_NotFound = NVMLError_NotFound
    NVMLError_InvalidArgument = NVMLError_InvalidArgument
    NVMLError_NoPermission = NVMLError_NoPermission

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlSystemGetDriverVersion(self) -> str | bytes:
        return self._text("580.65.06")

    def nvmlDeviceGetCount(self) -> int:
        assert self.open == 1
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeGpu:
        return self.gpus[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> FakeGpu:
        if not uuid.startswith("MIG-"):
            raise NVMLError_InvalidArgument
        for gpu in (mig for parent in self.gpus for mig in parent.split or () if mig):
            if gpu.uuid == uuid:
                return gpu
        raise NVMLError_NotFound

    def nvmlDeviceGetName(self, handle: FakeGpu) -> str | bytes:
        return self._text(handle.name)

    def nvmlDeviceGetUUID(self, handle: FakeGpu) -> str | bytes:
        return self._text(handle.uuid)

    def nvmlDeviceGetMemoryInfo(self, handle: FakeGpu, version: int) -> Memory:
        assert version == self.nvmlMemory_v2
        return handle.memory

    def nvmlDeviceGetComputeRunningProcesses(self, handle: FakeGpu) -> tuple[Process, ...]:
        if handle.processes is None:
            raise NVMLError_NoPermission
        return handle.processes

    def nvmlDeviceGetP2PStatus(self, device1: FakeGpu, device2: FakeGpu, p2pIndex: int) -> int:
        pair = (self.gpus.index(device1), self.gpus.index(device2))
        if p2pIndex == self.NVML_P2P_CAPS_INDEX_NVLINK:
            if not self.nvlinks:
                raise NVMLError_NotSupported
            return 0 if pair in self.nvlinks else 5
        return 0 if pair in self.peers else 2

    def nvmlDeviceIsMigDeviceHandle(self, device: FakeGpu) -> bool:
        return device.is_mig

    def nvmlDeviceGetMigMode(self, device: FakeGpu) -> list[int]:
        if not device.has_mig or device.is_mig:
            raise NVMLError_NotSupported
        return [int(device.split is not None), 0]

    def nvmlDeviceGetMaxMigDeviceCount(self, device: FakeGpu) -> int:
        return 7 if device.has_mig else 0

    def nvmlDeviceGetMigDeviceHandleByIndex(self, device: FakeGpu, index: int) -> FakeGpu:
        found = (device.split or ())[index : index + 1]
        if not found or found[0] is None:
            raise NVMLError_NotFound
        return found[0]

    def _text(self, text: str) -> str | bytes:
        return text.encode() if self.bytes_as_text else text
