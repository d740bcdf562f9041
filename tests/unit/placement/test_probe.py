"""What the machine says, read from files that a test wrote."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from placement import probe
from placement.errors import PlacementError
from placement.hardware import Gpu, Inventory, Node, parse_inventory
from tests.fakes.nvml import GIB, FakeGpu, FakeNvml, Memory, Process


def test_available_memory_is_bounded_by_the_container(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  3000 kB\nMemAvailable:   2000 kB\nHugePages_Total: 0\n")
    assert probe.available_memory(meminfo, tmp_path) == 2000 * 1024
    (tmp_path / "memory.max").write_text("1500000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    assert probe.available_memory(meminfo, tmp_path) == 1_100_000
    (tmp_path / "memory.max").write_text("max\n")
    assert probe.available_memory(meminfo, tmp_path) == 2000 * 1024


def test_a_system_that_does_not_say(tmp_path: Path) -> None:
    with pytest.raises(PlacementError, match="give sizes by hand"):
        probe.available_memory(tmp_path / "none", tmp_path)
    assert probe.computes_bf16_natively(tmp_path / "none") is False


@pytest.mark.parametrize(("flags", "native"), [("fpu avx512_bf16 sse", True), ("amx_bf16", True), ("avx512f", False)])
def test_bf16_flag(tmp_path: Path, flags: str, native: bool) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {flags}\n\nprocessor\t: 1\nflags\t\t: {flags}\n")
    assert probe.computes_bf16_natively(cpuinfo) is native


def ray_node(name: str, alive: bool = True, **resources: float) -> dict[str, Any]:
    """One entry of `ray.nodes()`."""
    resources = {"node:" + name: 1.0, "CPU": 8.0, "memory": 64e9, **resources}
    return {"NodeName": name, "Alive": alive, "Resources": resources, "Labels": {}}


def test_a_ray_cluster() -> None:
    nodes = [
        ray_node("b", GPU=4.0, **{"accelerator_type:L4": 1.0}),
        ray_node("gone", alive=False, GPU=8.0),
        ray_node("a"),
        ray_node("c", GPU=2.0, **{"accelerator_type:A100": 1.0}),
    ]
    found = probe.inventory_of(nodes)
    assert [(node.name, len(node.gpus), node.cpus, node.memory_bytes) for node in found.nodes] == [
        ("a", 0, 8, 64 * 10**9),
        ("b", 4, 8, 64 * 10**9),
        ("c", 2, 8, 64 * 10**9),
    ]
    assert {gpu.accelerator_type for gpu in found.nodes[1].gpus} == {"L4"}
    assert found.nodes[1].gpus[0].memory_bytes == Gpu.of("L4").memory_bytes
    # Ray says A100 of both sizes: the smaller is planned with.
    assert found.nodes[2].gpus[0].memory_bytes == Gpu.of("A100 40GB").memory_bytes


@pytest.mark.parametrize(
    ("resources", "message"),
    [
        ({}, "Ray node a has 2 GPUs and names no kind of them; give it one accelerator_type"),
        ({"accelerator_type:L4": 1.0, "accelerator_type:T4": 1.0}, "names L4 and T4 of them"),
        ({"accelerator_type:XYZ": 1.0}, "Ray node a: GPU 'XYZ' is not known: .* write an inventory by hand"),
    ],
)
def test_a_ray_cluster_of_unknown_gpus(resources: dict[str, float], message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        probe.inventory_of([ray_node("a", GPU=2.0, **resources)])


def test_an_inventory_is_read_as_it_was_printed() -> None:
    taken = Gpu.of("NVIDIA H200", free_bytes=10**9)
    nodes = (Node("a", (taken, Gpu.of("A100-80GB", accelerator_type="A100-80G")), 8, 10**10), Node("b", ()))
    assert parse_inventory(probe.inventory_text(Inventory(nodes))) == Inventory(nodes)


def test_the_command_prints_an_inventory_with_remarks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    two = [FakeGpu(uuid="GPU-a"), FakeGpu(uuid="GPU-b", memory=Memory(24 * GIB, GIB, 3 * GIB))]
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(two, nvlinks={(0, 1), (1, 0)}))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert probe.main([]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[:3] == [
        "# NVIDIA driver 580.65.06",
        "# 0: GPU-a, 24.7 GB free; links to 1: nvlink",
        "# 1: GPU-b, 21.5 GB free; links to 0: nvlink",
    ]
    assert [gpu.free_bytes for gpu in parse_inventory(printed).gpus] == [23 * GIB, 20 * GIB]


def test_nvml_is_asked_before_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    nvml = FakeNvml([FakeGpu(memory=Memory(24 * GIB, GIB, 5 * GIB))])
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert probe.cuda_gpus() == (), "a torch without CUDA can use none"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert [gpu.free_bytes for gpu in probe.cuda_gpus()] == [18 * GIB]
    # With a context and a cache of ours: 3 GiB are ours, 2 of them torch's tensors.
    nvml.gpus[0].processes = (Process(os.getpid(), 3 * GIB),)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 2 * GIB)
    assert [gpu.free_bytes for gpu in probe.cuda_gpus()] == [19 * GIB]


def test_torch_is_asked_where_nvml_can_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: ((10 + index) * GIB, 22 * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(name="NVIDIA L4"))
    several = FakeNvml([FakeGpu(), FakeGpu("NVIDIA T4", "GPU-1")])  # in an order of CUDA's own
    for library in (None, several, FakeNvml([FakeGpu()])):
        monkeypatch.setitem(sys.modules, "pynvml", library)
        found = probe.cuda_gpus()
        assert [(gpu.name, gpu.free_bytes, gpu.memory_bytes) for gpu in found] == [
            ("NVIDIA L4", 10 * GIB, 22 * GIB),
            ("NVIDIA L4", 11 * GIB, 22 * GIB),
        ]


def test_this_machine() -> None:
    node = probe.inventory().nodes[0]
    assert node.cpus >= 1
    assert node.memory_bytes > 0
