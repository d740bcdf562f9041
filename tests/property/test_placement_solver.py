"""The solver against every possible split, and what must hold of every plan."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, permutations
from typing import Any

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from placement.errors import DoesNotFit, PlacementError
from placement.export import from_json, max_memory, to_json
from placement.footprint import Footprint
from placement.hardware import Gpu
from placement.kv import LayerKv
from placement.plan import Plan, solve
from placement.problem import Cut, Problem
from placement.question import LAST_RESORT, Demand, Order, Question
from placement.solver import Cuts, Goal, best
from placement.workload import Workload
from tests.unit.placement.toy import small_sampler, toy_encoder_decoder, toy_footprint

WORKLOAD = Workload(block_size=2, max_batch_tokens=3, max_sequences=4, max_context=9, kv_dtype="float16")
GOALS: tuple[Goal, ...] = ("throughput", "capacity", "latency")
ORDERS: tuple[Order, ...] = ("given", "best")
MODULES = ("embed", "head", *(f"layers.{i}" for i in range(6)))


@pytest.fixture(autouse=True, scope="module")
def _small_sampler() -> Iterator[None]:
    with small_sampler():
        yield


@st.composite
def decoders(draw: st.DrawFn) -> Footprint:
    count = draw(st.integers(1, 6))
    sizes = st.lists(st.integers(1, 60), min_size=count, max_size=count)
    caches = st.builds(
        LayerKv, st.integers(0, 4), st.just(1), conv_elements=st.integers(0, 3), recurrent_elements=st.integers(0, 2)
    )
    return toy_footprint(
        draw(sizes),
        embedding=draw(st.integers(0, 80)),
        head=draw(st.integers(0, 80)),
        tied=draw(st.booleans()),
        works=draw(sizes),
        head_work=draw(st.integers(0, 60)),
        kv=draw(st.lists(caches, min_size=count, max_size=count)),
    )


blocks_of_layers = st.lists(st.integers(1, 60), min_size=1, max_size=3)
models = st.one_of(
    decoders(), st.builds(toy_encoder_decoder, blocks_of_layers, blocks_of_layers, embedding=st.integers(0, 80))
)
gpu = st.builds(Gpu, st.just("toy"), st.integers(200, 1800), speed=st.integers(1, 4), device_type=st.just("cpu"))
devices = st.lists(gpu, min_size=1, max_size=4).map(tuple)
demands = st.one_of(st.just(Demand()), st.builds(Demand, st.integers(1, 9), st.integers(1, 4), st.integers(1, 9)))


@st.composite
def questions(draw: st.DrawFn) -> Question:
    model, gpus = draw(models), draw(devices)
    last_resort = draw(st.booleans()) and len(gpus) > 1
    pins: tuple[int | None, ...] = ()
    if draw(st.booleans()):
        targets = st.sampled_from([None, None, *range(len(gpus) - last_resort), *([LAST_RESORT] * last_resort)])
        pins = tuple(draw(targets) for _ in model.layers)
    caps = tuple(draw(st.one_of(st.just(gpu.memory_bytes), st.integers(0, gpu.memory_bytes))) for gpu in gpus)
    order = draw(st.sampled_from(ORDERS))
    return Question(model, gpus, caps, WORKLOAD, draw(demands), pins, order, last_resort)


def splits(question: Question) -> list[Cuts]:
    """Every choice and order of devices, and every cut between them, that keeps the pins and the order."""
    layers, gpus = len(question.footprint.layers), len(question.devices)
    free = gpus - question.last_resort
    choose = permutations if question.order == "best" else combinations
    chosen = [c for stages in range(free + 1) for c in choose(range(free), stages)]
    if question.last_resort:
        chosen += [(*c, free) for c in chosen]
    found = [
        tuple(Cut(device, start, end) for device, start, end in zip(some, (0, *inner), (*inner, layers), strict=True))
        for some in chosen
        if some
        for inner in combinations(range(1, layers), len(some) - 1)
    ]
    pins = [(i, pin % gpus) for i, pin in enumerate(question.pins) if pin is not None]
    return [cuts for cuts in found if all(_device(cuts, layer) == device for layer, device in pins)]


def _device(cuts: Cuts, layer: int) -> int:
    return next(cut.device for cut in cuts if cut.start <= layer < cut.end)


def blocks_of(problem: Problem, cuts: Cuts) -> int:
    """The most blocks that every stage of a split has room for, by counting up."""
    blocks = 0
    while blocks < WORKLOAD.most_blocks and all(
        problem.need(cut, blocks + 1) <= problem.question.budgets[cut.device] for cut in cuts
    ):
        blocks += 1
    return blocks


def score(problem: Problem, goal: Goal, cuts: Cuts, blocks: int, fastest: int) -> tuple[int, ...] | None:
    """Smaller is better; None where the goal forbids it."""
    times = [problem.time(cut) for cut in cuts]
    if goal == "latency":
        return sum(times), len(cuts), -blocks
    if goal == "throughput" and max(times) * 100 > fastest * 105:
        return None
    return -blocks, max(times)


def on_the_last_resort(question: Question, cuts: Cuts) -> int:
    return sum(cut.end - cut.start for cut in cuts if cut.device == len(question.devices) - 1) * question.last_resort


@given(questions(), st.sampled_from(GOALS))
def test_the_solver_equals_brute_force(question: Question, goal: Goal) -> None:
    problem = Problem.of(question)
    possible = [(cuts, n) for cuts in splits(question) if (n := blocks_of(problem, cuts)) >= question.least_blocks]
    found = best(problem, goal)
    event(f"possible: {bool(possible)}")
    if not possible:
        assert found is None
        return
    assert found is not None
    fewest = min(on_the_last_resort(question, cuts) for cuts, _ in possible)
    possible = [(cuts, n) for cuts, n in possible if on_the_last_resort(question, cuts) == fewest]
    fastest = min(max(problem.time(cut) for cut in cuts) for cuts, _ in possible)
    scores = [s for cuts, n in possible if (s := score(problem, goal, cuts, n, fastest)) is not None]
    assert found.cuts in [cuts for cuts, _ in possible]
    assert blocks_of(problem, found.cuts) >= found.blocks >= question.least_blocks
    assert score(problem, goal, found.cuts, found.blocks, fastest) == min(scores)


def outcome(model: Footprint, gpus: tuple[Gpu, ...], **asked: Any) -> Plan | DoesNotFit:
    sizes: dict[str, Any] = {
        "block_size": WORKLOAD.block_size,
        "max_batch_tokens": WORKLOAD.max_batch_tokens,
        "max_sequences": WORKLOAD.max_sequences,
        "max_context": WORKLOAD.max_context,
    }
    try:
        return solve(model, gpus, **(sizes | asked))
    except DoesNotFit as error:
        return error


@given(models, devices, st.sampled_from(GOALS), st.sampled_from(ORDERS), st.one_of(st.none(), st.integers(1, 900)))
def test_every_plan_is_whole_and_within_its_budgets(
    model: Footprint, gpus: tuple[Gpu, ...], goal: Goal, order: Order, allow_cpu: int | None
) -> None:
    plan = outcome(model, gpus, goal=goal, order=order, allow_cpu=allow_cpu)
    if isinstance(plan, DoesNotFit):
        return
    placed = [name for stage in plan.stages for name in stage.modules]
    assert sorted(placed) == sorted(module.name for module in model.modules)
    used = [stage.device for stage in plan.stages]
    assert len(set(used)) == len(used)
    assert order == "best" or used == sorted(used)
    assert [stage.layers[0] for stage in plan.stages] == [0, *(stage.layers[1] for stage in plan.stages[:-1])]
    assert plan.stages[-1].layers[1] == len(model.layers)
    sizes = [*(gpu.memory_bytes for gpu in gpus), allow_cpu or 0]
    by_name = {module.name: module for module in model.modules}
    shared = {module.name for module in model.with_role("shared")}
    for stage in plan.stages:
        held = [by_name[name] for name in (*stage.modules, *stage.copies)]
        distinct = {t.storage: t.bytes for module in held for t in module.tensors}
        assert stage.weight_bytes == sum(distinct.values()) == sum(term.bytes for term in stage.weights)
        assert shared <= {*stage.modules, *stage.copies}
        assert stage.weight_bytes + stage.reserve_bytes + plan.kv_bytes(stage) <= stage.budget_bytes
        assert stage.budget_bytes <= sizes[stage.device]
        assert plan.unused_bytes(stage) >= 0
    assert plan.num_blocks >= 1
    assert plan.max_context <= plan.capacity_tokens
    assert plan.window_aware_bytes <= plan.sequence_bytes
    assert from_json(to_json(plan)) == plan
    assert outcome(model, gpus, goal=goal, order=order, allow_cpu=allow_cpu) == plan


@given(models, devices, st.lists(st.integers(0, 500), min_size=4, max_size=4), st.sampled_from(ORDERS))
def test_more_memory_never_lowers_capacity(
    model: Footprint, gpus: tuple[Gpu, ...], more: list[int], order: Order
) -> None:
    roomier = tuple(replace(gpu, memory_bytes=gpu.memory_bytes + extra) for gpu, extra in zip(gpus, more, strict=False))
    before, after = (outcome(model, some, goal="capacity", order=order) for some in (gpus, roomier))
    if isinstance(before, Plan):
        assert isinstance(after, Plan)
        assert after.num_blocks >= before.num_blocks


@given(models, devices)
def test_any_order_is_at_least_as_good_as_the_given(model: Footprint, gpus: tuple[Gpu, ...]) -> None:
    given_order, any_order = (outcome(model, gpus, goal="capacity", order=order) for order in ORDERS)
    if isinstance(given_order, Plan):
        assert isinstance(any_order, Plan)
        assert any_order.num_blocks >= given_order.num_blocks


@given(models, devices)
def test_exported_caps_still_fit(model: Footprint, gpus: tuple[Gpu, ...]) -> None:
    plan = outcome(model, gpus, goal="capacity")
    if isinstance(plan, Plan):
        caps = dict.fromkeys(range(len(gpus)), 0) | max_memory(plan)
        capped = outcome(model, gpus, goal="capacity", max_memory=caps)
        assert isinstance(capped, Plan)
        assert capped.num_blocks == plan.num_blocks


@given(models, devices, demands, st.dictionaries(st.sampled_from(MODULES), st.integers(0, 3), max_size=3))
def test_pins_are_kept_or_refused(
    model: Footprint, gpus: tuple[Gpu, ...], demand: Demand, pins: dict[str, int]
) -> None:
    asked = {"min_context": demand.context, "min_concurrency": demand.requests, "concurrent_context": demand.length}
    plan: Plan | PlacementError
    try:
        plan = outcome(model, gpus, pins=pins, **asked)
    except PlacementError as refusal:
        plan = refusal
    if isinstance(plan, PlacementError):
        assert isinstance(plan, DoesNotFit) or "pin" in str(plan)
        assert "\n" not in str(plan)
    if isinstance(plan, Plan):
        at = {name: stage.device for stage in plan.stages for name in stage.modules}
        assert {name: at[name] for name in pins} == pins
        assert plan.num_blocks >= demand.blocks(WORKLOAD.block_size)


@given(models, devices, demands)
def test_what_is_said_to_be_missing_is_enough(model: Footprint, gpus: tuple[Gpu, ...], demand: Demand) -> None:
    asked = {"min_context": demand.context, "min_concurrency": demand.requests, "concurrent_context": demand.length}
    error = outcome(model, gpus, **asked)
    if isinstance(error, DoesNotFit):
        assert "\n" not in str(error)
        assert error.have == tuple(gpu.memory_bytes for gpu in gpus)
        each = list(zip(gpus, error.need, error.have, strict=True))
        assert any(need > have for _, need, have in each)
        mended = tuple(replace(gpu, memory_bytes=max(need, have)) for gpu, need, have in each)
        assert isinstance(outcome(model, mended, **asked), Plan)
