"""A machine as NVML tells it: order, free bytes, MIG devices and links of made-up GPUs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from placement.nvml import Machine, UnknownOrder, read_machine
from tests.fakes.nvml import GIB, FakeGpu, FakeNvml, Memory, Process

OURS = 77


def l4s(count: int) -> list[FakeGpu]:
    """GPUs of one kind; the i-th has i GiB taken."""
    return [FakeGpu(uuid=f"GPU-{i}a-{i}", memory=Memory(24 * GIB, GIB, i * GIB)) for i in range(count)]


def seen(
    nvml: FakeNvml, visible: str | None = None, cached: dict[int, int] | None = None, order: str | None = None
) -> Machine:
    """The machine under these variables."""
    variables = {"CUDA_VISIBLE_DEVICES": visible, "CUDA_DEVICE_ORDER": order}
    environment = {name: value for name, value in variables.items() if value is not None}
    machine = read_machine(nvml, environment, OURS, cached or {})
    assert nvml.open == 0
    return machine


def test_memory_is_what_cuda_counts() -> None:
    (gpu,) = seen(FakeNvml([FakeGpu(memory=Memory(24 * GIB, GIB, 3 * GIB))])).gpus
    assert (gpu.name, gpu.memory_bytes, gpu.free_bytes) == ("NVIDIA L4", 23 * GIB, 20 * GIB)
    assert (gpu.accelerator_type, gpu.bandwidth) == ("L4", 300 * 10**9)


@pytest.mark.parametrize(
    ("visible", "uuids"),
    [
        (None, "0123"),
        ("", ""),
        ("2,0", "20"),
        (" 1 ,3", "13"),
        ("0,2,-1,1", "02"),
        ("1,9,2", "1"),
        ("GPU-3a,GPU-1a-1", "31"),
        ("GPU-3a,1", "31"),
        ("GPU-,1", ""),
        ("all", ""),
        ("MIG-x,1", ""),
    ],
)
def test_visible_devices_in_cudas_order(visible: str | None, uuids: str) -> None:
    machine = seen(FakeNvml(l4s(4)), visible)
    assert machine.uuids == tuple(f"GPU-{i}a-{i}" for i in uuids)
    assert [gpu.free_bytes for gpu in machine.gpus] == [(23 - int(i)) * GIB for i in uuids]


def test_indices_of_several_kinds_mean_what_cuda_decides() -> None:
    nvml = FakeNvml([FakeGpu(uuid="GPU-a"), FakeGpu("NVIDIA H200", "GPU-b", Memory(141 * GIB, GIB, 0))])
    for visible in (None, "0", "GPU-a,1"):
        with pytest.raises(UnknownOrder, match="CUDA_DEVICE_ORDER=PCI_BUS_ID"):
            seen(nvml, visible)
        assert nvml.open == 0
    assert seen(nvml, order="PCI_BUS_ID").uuids == ("GPU-a", "GPU-b")
    assert seen(nvml, "1,0", order="PCI_BUS_ID").uuids == ("GPU-b", "GPU-a")
    assert seen(nvml, "GPU-b").uuids == ("GPU-b",)
    assert seen(nvml, "").gpus == ()


def test_our_own_context_is_not_taken_memory() -> None:
    processes = (Process(1, 9 * GIB), Process(OURS, 2 * GIB), Process(2, None))
    gpu = FakeGpu(memory=Memory(24 * GIB, GIB, 11 * GIB), processes=processes)
    # 12 GiB are free, and 2 are ours; 1.5 of these are tensors (torch's), the rest the context.
    assert seen(FakeNvml([gpu])).gpus[0].free_bytes == 14 * GIB
    assert seen(FakeNvml([gpu]), cached={0: 3 * GIB // 2}).gpus[0].free_bytes == 12 * GIB + GIB // 2
    gpu.processes = None
    assert seen(FakeNvml([gpu])).gpus[0].free_bytes == 12 * GIB


def mig(number: int) -> FakeGpu:
    """A seventh of an A100."""
    return FakeGpu("NVIDIA A100-SXM4-40GB MIG 1g.5gb", f"MIG-{number}", Memory(5 * GIB, 0, number * GIB), is_mig=True)


def test_a_mig_device_is_planned_with_its_own_memory() -> None:
    a100 = FakeGpu("NVIDIA A100-SXM4-40GB", "GPU-a", split=(None, mig(1), mig(2)))
    nvml = FakeNvml([a100, replace(a100, uuid="GPU-b", split=())])
    assert seen(nvml, "MIG-2").uuids == ("MIG-2",)
    assert seen(nvml, "MIG-2,MIG-1").uuids == ("MIG-2",)  # CUDA shows a process one at most
    for visible in (None, "0", "0,1", "GPU-a"):
        machine = seen(nvml, visible)
        assert machine.uuids == ("MIG-1",)
        assert (machine.gpus[0].memory_bytes, machine.gpus[0].free_bytes) == (5 * GIB, 4 * GIB)
    assert seen(nvml, "1").gpus == ()  # split, into nothing
    assert seen(nvml, "MIG-7").gpus == ()


def test_links() -> None:
    gpus = l4s(4)
    gpus[3].has_mig = False
    nvml = FakeNvml(gpus, nvlinks={(0, 1), (1, 0)}, peers={(0, 1), (1, 0), (0, 2), (2, 0)})
    assert seen(nvml).links == (
        ("self", "nvlink", "pcie", "host"),
        ("nvlink", "self", "host", "host"),
        ("pcie", "host", "self", "host"),
        ("host", "host", "host", "self"),
    )
    assert seen(nvml, "2,0").links == (("self", "pcie"), ("pcie", "self"))
    assert seen(replace(nvml, nvlinks=set()), "0,2").links == (("self", "pcie"), ("pcie", "self"))


def test_old_releases_return_bytes() -> None:
    machine = seen(FakeNvml(l4s(1), bytes_as_text=True), "GPU-0a")
    assert (machine.driver, machine.gpus[0].name, machine.uuids) == ("580.65.06", "NVIDIA L4", ("GPU-0a-0",))
