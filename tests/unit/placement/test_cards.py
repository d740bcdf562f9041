"""Which GPU a name means, and what is assumed of one that nobody knows."""

from __future__ import annotations

import pytest

from placement.cards import CARDS, Card, find_card, rates, runs_flashinfer

GIB, GB, TFLOPS = 2**30, 10**9, 10**12


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("H100-SXM", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB PCIe"),
        ("NVIDIA A100-PCIE-40GB", "A100 40GB"),
        ("A100-80G", "A100 80GB"),
        ("A100", "A100 40GB"),
        ("Tesla V100-SXM2-32GB", "V100 32GB"),
        ("Tesla T4", "T4"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA RTX A6000", "RTX A6000"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("GeForce-RTX-5090", "RTX 5090"),
        ("AMD-Instinct-MI300X-OAM", "MI300X"),
        ("A100 20GB", None),
        ("24GiB", None),
        ("", None),
    ],
)
def test_names(name: str, kind: str | None) -> None:
    card = find_card(name)
    assert (card.name if card else None) == kind


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_every_kind_is_found_by_its_own_name(card: Card) -> None:
    assert find_card(card.name) == card
    assert find_card(card.name.replace(" ", "-").lower()) == card


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 2060", "GeForce RTX 2070 SUPER", "NVIDIA GeForce RTX 2080 Ti", "GeForce-RTX-2080",
        "NVIDIA GeForce GTX 1080 Ti", "GeForce GTX 1650", "Quadro RTX 6000", "Quadro P5000", "Quadro GV100",
        "Tesla P100-PCIE-16GB", "P100", "Tesla P40", "P4", "NVIDIA TITAN V", "NVIDIA TITAN RTX", "TITAN Xp",
        "Tesla V100S-PCIE-32GB", "Tesla T4", "V100", "NVIDIA T4G", "NVIDIA T1000",
    ],
)  # fmt: skip
def test_gpus_older_than_ampere_run_no_flashinfer(name: str) -> None:
    assert not runs_flashinfer(name, 11 * GIB)


@pytest.mark.parametrize(
    "name", ["NVIDIA H200", "NVIDIA RTX 6000 Ada Generation", "NVIDIA GeForce RTX 3060", "NVIDIA RTX A4000", "24GiB"]
)
def test_newer_ones_and_those_that_nobody_knows_do(name: str) -> None:
    assert runs_flashinfer(name, 24 * GIB)


def test_memory_decides_where_the_name_does_not() -> None:
    assert find_card("A100", 85 * GB).name == "A100 80GB"  # type: ignore[union-attr]  # known names
    assert find_card("V100", 34 * GB).name == "V100 32GB"  # type: ignore[union-attr]  # known names


def test_rates() -> None:
    assert rates("NVIDIA H200", 140 * GIB) == (4800 * GB, 989 * TFLOPS)
    # 10 GB * 25 / s, and 150 FLOP for each byte.
    assert rates("unheard of", 10 * GB) == (250 * GB, 37_500 * GB)
    # Half of an L4's 21.9 GiB: half of its 300 GB/s and 121 TFLOP/s.
    half = rates("NVIDIA L4 MIG 1g.11gb", find_card("L4").memory_bytes // 2)  # type: ignore[union-attr]  # known names
    assert half == (pytest.approx(150 * GB), pytest.approx(60.5 * TFLOPS))


def test_the_rule_of_thumb_is_near_the_table() -> None:
    for card in CARDS:
        bandwidth, flops = rates("unheard of", card.memory_bytes)
        assert card.bandwidth / 3 < bandwidth < 3 * card.bandwidth, card.name
        assert card.flops / 8 < flops < 8 * card.flops, card.name
