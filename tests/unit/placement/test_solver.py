"""Splits small enough to add up by hand. The reserve is nothing here, so a budget is weights + KV."""

from __future__ import annotations

from dataclasses import replace

import pytest

from placement.footprint import Footprint
from placement.hardware import Gpu
from placement.reserve import Reserve, Workload
from placement.solver import Cut, Problem
from tests.unit.placement.toy import toy_footprint

NOTHING = Reserve(0, 0, 0, 0, 0, 0, 0, 0)
ONE_TOKEN_BLOCKS = Workload(block_size=1, max_batch_tokens=1, max_sequences=8, max_context=64, kv_dtype="float16")


def problem(footprint: Footprint, budgets: tuple[int, ...], speeds: tuple[int, ...] | None = None) -> Problem:
    speeds = speeds or (1,) * len(budgets)
    devices = tuple(Gpu(f"toy{i}", budget, speed=speeds[i], device_type="cpu") for i, budget in enumerate(budgets))
    return replace(Problem.of(footprint, devices, budgets, ONE_TOKEN_BLOCKS), reserves=(NOTHING,) * len(budgets))


def test_one_device_holds_all() -> None:
    # 100 embed + 3 * 10 layers + 2 rotary + 1 norm + 20 head = 153; a block is 3 layers * 4 = 12 bytes.
    # 11 blocks and the scratch block: 153 + 12 * 12 = 297.
    model = toy_footprint([10, 10, 10], head=20)
    assert problem(model, (297,)).best("throughput") == ((Cut(0, 0, 3),), 11)
    assert problem(model, (296,)).best("throughput") == ((Cut(0, 0, 3),), 10)


def test_a_tied_head_costs_one_copy_on_one_device_and_two_on_two() -> None:
    # One device: 100 embed + 20 layers + 2 rotary + 1 norm = 123, and 2 blocks of 8 bytes = 139.
    model = toy_footprint([10, 10], tied=True)
    assert problem(model, (139,)).best("throughput") == ((Cut(0, 0, 2),), 1)
    assert problem(model, (138,)).best("throughput") is None
    # Two: 100 + 10 + 2 and 10 + 2 + 1 + 100, each with 2 blocks of 4 bytes = 120 and 121.
    assert problem(model, (120, 121)).best("throughput") == ((Cut(0, 0, 1), Cut(1, 1, 2)), 1)
    assert problem(model, (120, 120)).best("throughput") is None


def test_throughput_evens_out_the_work() -> None:
    # Four layers of 10 and a head of 20: 30 + 30.
    model = toy_footprint([10, 10, 10, 10], head=20, head_work=20)
    cuts, _ = problem(model, (10_000, 10_000)).best("throughput")  # type: ignore[misc]
    assert cuts == (Cut(0, 0, 3), Cut(1, 3, 4))


def test_a_faster_device_gets_more_layers() -> None:
    model = toy_footprint([10] * 8)
    cuts, _ = problem(model, (10_000, 10_000), speeds=(1, 3)).best("throughput")  # type: ignore[misc]
    assert cuts == (Cut(0, 0, 2), Cut(1, 2, 8))


def test_throughput_gives_up_five_percent_for_capacity_and_no_more() -> None:
    # 40 layers of 1: even is 20 + 20, and 5 % allows 19 + 21. Device 0 has 500:
    # 20 layers + 2 rotary leave 478 = 5 blocks of 80, 4 beside the scratch block;
    # 19 layers + 2 leave 479 = 6 blocks of 76, so 5.
    model = problem(toy_footprint([1] * 40, embedding=0), (500, 2000))
    assert model.best("throughput") == ((Cut(0, 0, 19), Cut(1, 19, 40)), 5)
    # Capacity goes on: 8 + 32 leave 490 and 1965, 15 blocks of 32 and of 128, so 14; 9 + 31 gives 13 and 15.
    assert model.best("capacity") == ((Cut(0, 0, 8), Cut(1, 8, 40)), 14)


def test_latency_takes_one_device_when_it_can() -> None:
    model = toy_footprint([10] * 4)
    assert problem(model, (1000, 2000)).best("latency")[0] == (Cut(1, 0, 4),)  # type: ignore[index]
    # Not one of them can: 100 + 2 + 4 * 10 + 1 + 2 blocks of 16 = 175.
    cuts, _ = problem(model, (174, 174)).best("latency")  # type: ignore[misc]
    assert len(cuts) == 2


def test_a_device_too_small_for_one_layer_stays_empty() -> None:
    # Device 1 would hold 10 layer + 2 rotary + 2 blocks of 4 = 20.
    model = toy_footprint([10, 10, 10])
    cuts, _ = problem(model, (130, 19, 200)).best("throughput")  # type: ignore[misc]
    assert [cut.device for cut in cuts] == [0, 2]


def test_no_more_blocks_than_sequences_can_use() -> None:
    # 8 sequences of 64 tokens in blocks of 1.
    assert problem(toy_footprint([10]), (10**9,)).best("capacity") == ((Cut(0, 0, 1),), 512)


@pytest.mark.parametrize("goal", ["throughput", "capacity", "latency"])
def test_nothing_fits(goal: str) -> None:
    assert problem(toy_footprint([10]), (50, 50)).best(goal) is None  # type: ignore[arg-type]
