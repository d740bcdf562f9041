"""Sizes, GPUs and inventories as people write them."""

from __future__ import annotations

import json

import pytest

from placement.errors import PlacementError
from placement.hardware import (
    Gpu,
    Inventory,
    Node,
    format_bytes,
    parse_bytes,
    parse_gpus,
    parse_inventory,
    virtual_cpu_devices,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("600MB", 600_000_000),
        ("1GB", 10**9),
        ("24GiB", 24 * 2**30),
        ("1.5 GB", 1_500_000_000),
        ("0.1TB", 10**11),
        ("512kb", 512_000),
        ("3KiB", 3072),
        ("17", 17),
        (17, 17),
        ("5B", 5),
    ],
)
def test_parse_bytes(text: str | int, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1XB", "1 GB 2", "1e9", True, 1.5, -3])
def test_parse_bytes_refuses(text: object) -> None:
    with pytest.raises(PlacementError, match="600MB or 24GiB"):
        parse_bytes(text)  # type: ignore[arg-type]  # wrong on purpose


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1283457024, "1.28 GB"), (600 * 10**6, "600.0 MB"), (-1500, "-1.50 kB")],
)
def test_format_bytes(count: int, text: str) -> None:
    assert format_bytes(count) == text


def test_parse_gpus() -> None:
    gpus = parse_gpus("2x24GiB, 1*80GiB,16GB,2xH100-PCIe,RTX4090")
    assert [gpu.memory_bytes for gpu in gpus[:4]] == [24 * 2**30, 24 * 2**30, 80 * 2**30, 16 * 10**9]
    assert [gpu.name for gpu in gpus] == ["24GiB", "24GiB", "80GiB", "16GB", "H100-PCIe", "H100-PCIe", "RTX4090"]
    assert [gpu.accelerator_type for gpu in gpus[3:]] == [None, "H100", "H100", "GeForce-RTX-4090"]
    # GB/s of the memory: 24 * 2**30 * 25 / 10**9 = 644.2 of an unknown one.
    assert [gpu.speed for gpu in gpus] == [644, 644, 2147, 400, 2000, 2000, 1008]


def test_virtual_devices_are_counted_too() -> None:
    assert parse_gpus("2x600MB", device_type="cpu") == virtual_cpu_devices(("600MB", "600MB"))


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(
        PlacementError, match=r"GPU 'H900' is neither a size such as 24GiB nor one of B200, .*A100-40GB"
    ):
        parse_gpus("2xH900")
    with pytest.raises(PlacementError, match="GPU 'H900' is not known: give its memory, or one of B200"):
        parse_inventory("gpus: [{name: H900}]")


@pytest.mark.parametrize("text", ["", "2x", "0x24GiB", "24GiB;80GiB", "x24GiB", "24"])
def test_parse_gpus_refuses(text: str) -> None:
    with pytest.raises(PlacementError, match="24GiB"):
        parse_gpus(text)


def test_virtual_devices() -> None:
    assert virtual_cpu_devices(("600MB", 10**9)) == (
        Gpu("cpu0", 600 * 10**6, device_type="cpu"),
        Gpu("cpu1", 10**9, device_type="cpu"),
    )


def test_inventory_in_yaml_and_json_are_one() -> None:
    text = "nodes: [{name: a, cpus: 8, memory: 64GB, gpus: [{name: L4, memory: 24GB, count: 2, speed: 3, free: 20GB}]}]"
    gpu = Gpu.of("L4", 24 * 10**9, free_bytes=20 * 10**9, speed=3)
    expected = Inventory((Node("a", (gpu, gpu), 8, 64 * 10**9),))
    assert parse_inventory(text) == expected
    as_json = {
        "nodes": [
            {
                "name": "a",
                "cpus": 8,
                "memory": "64GB",
                "gpus": [{"name": "L4", "memory": "24GB", "count": 2, "speed": 3, "free": "20GB"}],
            }
        ]
    }
    assert parse_inventory(json.dumps(as_json)) == expected
    assert expected.gpus == (gpu, gpu)
    assert gpu.usable_bytes == 20 * 10**9


def test_one_machine_needs_no_nodes() -> None:
    inventory = parse_inventory("gpus: [{memory: 600MB, device_type: cpu}]")
    assert inventory.gpus == (Gpu("cpu", 600 * 10**6, device_type="cpu"),)


def test_what_is_given_wins_over_what_the_name_says() -> None:
    (known,) = parse_inventory("gpus: [{name: NVIDIA L4}]").gpus
    assert (known.memory_bytes, known.bandwidth, known.flops) == (219 * 2**30 // 10, 300 * 10**9, 121 * 10**12)
    assert (known.speed, known.accelerator_type, known.usable_bytes) == (300, "L4", known.memory_bytes)
    text = "gpus: [{name: L4, memory: 12GiB, bandwidth: 150.5GB, tflops: 60, accelerator_type: half}]"
    assert parse_inventory(text).gpus == (
        Gpu("L4", 12 * 2**30, None, 150, "cuda", 150_500_000_000, 60 * 10**12, "half"),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nodes: [", "not YAML"),
        ("[]", "must be a mapping"),
        ("nodes: 3", "nodes must be a list"),
        ("nodes: [{gpus: 3}]", r"nodes\[0\].gpus must be a list"),
        ("gpus: [{memory: 1GB, size: 3}]", "unknown key size"),
        ("gpus: [{count: 2}]", r"gpus\[0\]: memory is missing"),
        ("gpus: [{name: c, device_type: cpu}]", "memory is missing"),
        ("gpus: [{memory: 1GB, device_type: cpu, tflops: 3}]", "unknown key tflops"),
        ("gpus: [L4]", "must be a mapping"),
        ("gpus: [{name: L4, bandwidth: fast}]", "size 'fast'"),
        ("gpus: [{name: L4, speed: 3}, {name: T4}]", "speed is given for some GPUs only"),
        ("nodes: [{name: a, gpus: []}, {name: a, gpus: []}]", "two nodes have one name"),
        ("gpus: [{memory: 1GB, count: many}]", "whole number"),
        ("gpus: [{memory: 1GB, speed: 0}]", "positive"),
        ("gpus: [{memory: 1GB, free: 2GB}]", "free_bytes"),
        ("gpus: [{memory: 1GB, device_type: tpu}]", "cuda or cpu"),
    ],
)
def test_inventory_refuses_by_name(text: str, message: str) -> None:
    with pytest.raises(PlacementError, match=message) as caught:
        parse_inventory(text)
    assert "\n" not in str(caught.value)
