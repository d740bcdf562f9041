"""Splits small enough to add up by hand. The reserve is nothing here, so a budget is weights + KV."""

from __future__ import annotations

from typing import get_args

import pytest

from placement.errors import PlacementError
from placement.kv import LayerKv
from placement.problem import Cut, Problem
from placement.question import LAST_RESORT, Demand
from placement.solver import Cuts, Goal, best, fits, pack
from tests.unit.placement.toy import toy_encoder_decoder, toy_footprint, toy_problem


def cuts_of(problem: Problem, goal: Goal = "throughput") -> Cuts:
    split = best(problem, goal)
    assert split is not None
    return split.cuts


def test_one_device_holds_all() -> None:
    # 100 embed + 3 * 10 layers + 2 rotary + 1 norm + 20 head = 153; a block is 3 layers * 4 = 12 bytes.
    # 11 blocks and the scratch block: 153 + 12 * 12 = 297.
    model = toy_footprint([10, 10, 10], head=20)
    assert best(toy_problem(model, (297,)), "throughput") == ((Cut(0, 0, 3),), 11)
    assert best(toy_problem(model, (296,)), "throughput") == ((Cut(0, 0, 3),), 10)


def test_a_tied_head_costs_one_copy_on_one_device_and_two_on_two() -> None:
    # One device: 100 embed + 20 layers + 2 rotary + 1 norm = 123, and 2 blocks of 8 bytes = 139.
    model = toy_footprint([10, 10], tied=True)
    assert best(toy_problem(model, (139,)), "throughput") == ((Cut(0, 0, 2),), 1)
    assert best(toy_problem(model, (138,)), "throughput") is None
    # Two: 100 + 10 + 2 and 10 + 2 + 1 + 100, each with 2 blocks of 4 bytes = 120 and 121.
    assert best(toy_problem(model, (120, 121)), "throughput") == ((Cut(0, 0, 1), Cut(1, 1, 2)), 1)
    assert best(toy_problem(model, (120, 120)), "throughput") is None


def test_throughput_evens_out_the_work() -> None:
    # Four layers of 10 and a head of 20: 30 + 30.
    model = toy_footprint([10, 10, 10, 10], head=20, head_work=20)
    assert cuts_of(toy_problem(model, (10_000, 10_000))) == (Cut(0, 0, 3), Cut(1, 3, 4))


def test_a_faster_device_gets_more_layers() -> None:
    model = toy_footprint([10] * 8)
    assert cuts_of(toy_problem(model, (10_000, 10_000), speeds=(1, 3))) == (Cut(0, 0, 2), Cut(1, 2, 8))
    assert cuts_of(toy_problem(model, (10_000, 10_000), speeds=(1000, 3000))) == (Cut(0, 0, 2), Cut(1, 2, 8))


def test_throughput_gives_up_five_percent_for_capacity_and_no_more() -> None:
    # 40 layers of 1: even is 20 + 20, and 5 % allows 19 + 21. Device 0 has 500:
    # 20 layers + 2 rotary leave 478 = 5 blocks of 80, 4 beside the scratch block;
    # 19 layers + 2 leave 479 = 6 blocks of 76, so 5.
    problem = toy_problem(toy_footprint([1] * 40, embedding=0), (500, 2000))
    assert best(problem, "throughput") == ((Cut(0, 0, 19), Cut(1, 19, 40)), 5)
    # Capacity goes on: 8 + 32 leave 490 and 1965, 15 blocks of 32 and of 128, so 14; 9 + 31 gives 13 and 15.
    assert best(problem, "capacity") == ((Cut(0, 0, 8), Cut(1, 8, 40)), 14)


def test_latency_takes_one_device_when_it_can() -> None:
    model = toy_footprint([10] * 4)
    assert cuts_of(toy_problem(model, (1000, 2000)), "latency") == (Cut(1, 0, 4),)
    # Not one of them can: 100 + 2 + 4 * 10 + 1 + 2 blocks of 16 = 175.
    assert len(cuts_of(toy_problem(model, (174, 174)), "latency")) == 2


def test_latency_fills_the_fastest_device() -> None:
    # Device 1 is twice as fast and holds 3 of 6 layers: 3 * 10 + 2 rotary + 2 blocks of 12 = 56. The other 3 take as
    # long before it as behind it; behind it is device 2's, 3 * 10 + 3 + 24 = 57, and two stages are fewer than three.
    model = toy_footprint([10] * 6, embedding=0)
    assert cuts_of(toy_problem(model, (1000, 56, 57), speeds=(1, 2, 1)), "latency") == (Cut(1, 0, 3), Cut(2, 3, 6))
    # Device 1 has no room for the norm beside its three layers, and device 2 none for the other three.
    (_, fast, _) = cuts_of(toy_problem(model, (1000, 56, 56), speeds=(1, 2, 1)), "latency")
    assert (fast.device, fast.end - fast.start) == (1, 3)


def test_a_device_too_small_for_one_layer_stays_empty() -> None:
    # Device 1 would hold 10 layer + 2 rotary + 2 blocks of 4 = 20.
    problem = toy_problem(toy_footprint([10, 10, 10]), (130, 19, 200))
    assert [cut.device for cut in cuts_of(problem)] == [0, 2]


def test_no_more_blocks_than_sequences_can_use() -> None:
    # 8 sequences of 64 tokens in blocks of 1.
    assert best(toy_problem(toy_footprint([10]), (10**9,)), "capacity") == ((Cut(0, 0, 1),), 512)


@pytest.mark.parametrize("goal", get_args(Goal))
def test_nothing_fits(goal: Goal) -> None:
    assert best(toy_problem(toy_footprint([10]), (50, 50)), goal) is None


@pytest.mark.parametrize("goal", get_args(Goal))
def test_what_is_demanded_fits_or_nothing_does(goal: Goal) -> None:
    # Two layers: 100 + 20 + 2 + 1 = 123, and n + 1 blocks of 8. 20 tokens: 123 + 21 * 8 = 291.
    model = toy_footprint([10, 10])
    assert best(toy_problem(model, (291,), demand=Demand(context=20)), goal) == ((Cut(0, 0, 2),), 20)
    assert best(toy_problem(model, (290,), demand=Demand(context=20)), goal) is None
    assert best(toy_problem(model, (291,), demand=Demand(requests=4, length=5)), goal) == ((Cut(0, 0, 2),), 20)
    assert best(toy_problem(model, (290,), demand=Demand(requests=4, length=5)), goal) is None


def test_a_demand_outweighs_an_even_split() -> None:
    # 20 + 20 would leave device 0 four blocks, as above. For 9 it holds 12 layers at most (486 left, 10 blocks of 48),
    # and of that 5 % more are 29 on device 1: 11 layers leave 487, 11 blocks of 44, 10 beside the scratch block.
    model = toy_footprint([1] * 40, embedding=0)
    problem = toy_problem(model, (500, 2000), demand=Demand(context=9))
    assert best(problem, "throughput") == ((Cut(0, 0, 11), Cut(1, 11, 40)), 10)


def test_pins_are_kept() -> None:
    model = toy_footprint([10] * 4)
    pins = (None, 1, None, None)
    assert cuts_of(toy_problem(model, (10**4, 10**4), pins=pins)) == (Cut(0, 0, 1), Cut(1, 1, 4))
    assert cuts_of(toy_problem(model, (10**4, 10**4), pins=pins), "capacity") == (Cut(0, 0, 1), Cut(1, 1, 4))
    # Without the pin, latency would take one device.
    assert cuts_of(toy_problem(model, (10**4, 10**4), pins=(0, 1, None, None)), "latency") == (
        Cut(0, 0, 1),
        Cut(1, 1, 4),
    )
    # Layer 1 on device 1, which holds one layer: 10 + 2 + 2 blocks of 4 = 20, and device 2 the rest.
    assert cuts_of(toy_problem(model, (10**4, 20, 10**4), pins=pins)) == (Cut(0, 0, 1), Cut(1, 1, 2), Cut(2, 2, 4))
    assert best(toy_problem(model, (10**4, 19, 10**4), pins=pins), "throughput") is None


def test_the_last_resort_is_taken_last_and_for_least() -> None:
    # Device 0: 100 + 2 + 10 n + 2 blocks of 4 n: 4 layers are 174. Behind it: 10 n + 3 + 8 n, 2 layers are 39.
    model = toy_footprint([10] * 6)
    for goal in get_args(Goal):
        assert cuts_of(toy_problem(model, (10**6, 10**6), last_resort=True), goal) == (Cut(0, 0, 6),)
        assert cuts_of(toy_problem(model, (174, 10**6), last_resort=True), goal) == (Cut(0, 0, 4), Cut(1, 4, 6))
        assert cuts_of(toy_problem(model, (174, 39), last_resort=True), goal) == (Cut(0, 0, 4), Cut(1, 4, 6))
        assert best(toy_problem(model, (174, 38), last_resort=True), goal) is None
        assert best(toy_problem(model, (173, 39), last_resort=True), goal) is None
    assert not fits(toy_problem(model, (174, 38), last_resort=True))
    assert fits(toy_problem(model, (174, 39), last_resort=True))


def test_a_pin_takes_the_last_resort_before_it_is_needed() -> None:
    problem = toy_problem(toy_footprint([10] * 3), (10**6, 10**6), last_resort=True, pins=(None, LAST_RESORT, None))
    assert cuts_of(problem) == (Cut(0, 0, 1), Cut(1, 1, 3))


def test_the_best_order_puts_the_embedding_where_it_fits() -> None:
    # 100 embed + 10 + 2 + 8 = 120 fits device 1 alone; 10 + 3 + 8 = 21 fits both.
    model = toy_footprint([10, 10])
    assert best(toy_problem(model, (21, 120)), "throughput") is None
    for goal in get_args(Goal):
        assert best(toy_problem(model, (21, 120), order="best"), goal) == ((Cut(1, 0, 1), Cut(0, 1, 2)), 1)
    # Where the given order is as good as any, it stays.
    three = toy_problem(toy_footprint([10] * 3), (500, 400, 450), order="best")
    assert cuts_of(three) == pack(three, 1, time=10) == (Cut(0, 0, 1), Cut(1, 1, 2), Cut(2, 2, 3))
    assert cuts_of(toy_problem(model, (120, 121), order="best"), "latency") == (Cut(0, 0, 1), Cut(1, 1, 2))


def test_the_last_resort_stays_last_in_any_order() -> None:
    # As above, and the third layer is left over.
    model = toy_footprint([10, 10, 10])
    problem = toy_problem(model, (20, 120, 10**6), order="best", last_resort=True)
    assert cuts_of(problem) == (Cut(1, 0, 1), Cut(0, 1, 2), Cut(2, 2, 3))


def test_equal_devices_are_one_kind() -> None:
    model = toy_footprint([10] * 20)
    assert len(toy_problem(model, (10**4,) * 16, order="best").steps) == 16
    assert len(toy_problem(model, (10**4,) * 8 + (10**5,) * 8, order="best").steps) == 2 * 9 * 8
    with pytest.raises(PlacementError, match=r'weigh 2,304 choices .* among 9 kinds, .* give order="given"'):
        toy_problem(model, tuple(range(10**4, 10**4 + 9)), order="best")


def test_an_encoder_decoder_is_one_sequence() -> None:
    # The shared embedding is 100, once on each device that has an end of a stack. Encoder layers cache nothing, a
    # decoder layer 4 bytes a block. Device 0: 100 + 2 * 10 + 1 norm. Device 1: 100 + 2 * 10 + 1 norm + 2 blocks of 8.
    model = toy_encoder_decoder([10, 10], [10, 10])
    assert best(toy_problem(model, (121, 137)), "capacity") == ((Cut(0, 0, 2), Cut(1, 2, 4)), 1)
    assert best(toy_problem(model, (121, 136)), "capacity") is None
    # All on one: the embedding counts once.
    assert best(toy_problem(model, (158,)), "capacity") == ((Cut(0, 0, 4),), 1)
    assert best(toy_problem(model, (157,)), "capacity") is None
    # A stage with no end of a stack holds no embedding: encoder layer 1 and its norm are 11.
    model = toy_encoder_decoder([10, 10, 10], [10, 10])
    assert cuts_of(toy_problem(model, (110, 10, 10**4))) == (Cut(0, 0, 1), Cut(1, 1, 2), Cut(2, 2, 5))


def test_state_is_held_for_every_sequence() -> None:
    # Layer 0 caches 4 bytes a token; layer 1 keeps 3 * 2 + 5 * 4 = 26 bytes for each of 8 sequences = 208.
    # 100 + 10 + 2 + 2 blocks of 4 = 120, and 10 + 2 + 1 + 208 = 221.
    model = toy_footprint([10, 10], kv=(LayerKv(1, 1), LayerKv(conv_elements=3, recurrent_elements=5)))
    assert best(toy_problem(model, (120, 221)), "throughput") == ((Cut(0, 0, 1), Cut(1, 1, 2)), 1)
    assert best(toy_problem(model, (120, 220)), "throughput") is None
