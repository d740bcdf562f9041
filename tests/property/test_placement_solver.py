"""The solver against every possible split, and what must hold of every plan."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from placement.errors import DoesNotFit
from placement.export import from_json, max_memory, to_json
from placement.footprint import Footprint
from placement.hardware import Gpu
from placement.plan import Plan, solve
from placement.reserve import Workload
from placement.solver import Cut, Cuts, Goal, Problem
from tests.unit.placement.toy import toy_footprint

WORKLOAD = Workload(block_size=2, max_batch_tokens=3, max_sequences=4, max_context=9, kv_dtype="float16")
GOALS: tuple[Goal, ...] = ("throughput", "capacity", "latency")


@st.composite
def models(draw: st.DrawFn) -> Footprint:
    count = draw(st.integers(1, 6))
    sizes = st.lists(st.integers(1, 60), min_size=count, max_size=count)
    return toy_footprint(
        draw(sizes),
        embedding=draw(st.integers(0, 80)),
        head=draw(st.integers(0, 80)),
        tied=draw(st.booleans()),
        works=draw(sizes),
        head_work=draw(st.integers(0, 60)),
        kv_heads=draw(st.lists(st.integers(1, 4), min_size=count, max_size=count)),
    )


devices = st.lists(
    st.builds(Gpu, st.just("toy"), st.integers(200, 1800), speed=st.integers(1, 4), device_type=st.just("cpu")),
    min_size=1,
    max_size=4,
).map(tuple)


def as_problem(model: Footprint, gpus: tuple[Gpu, ...]) -> Problem:
    return Problem.of(model, gpus, tuple(gpu.memory_bytes for gpu in gpus), WORKLOAD)


def splits(layers: int, gpus: int) -> list[Cuts]:
    """Every choice of devices and every cut between them."""
    return [
        tuple(Cut(device, start, end) for device, start, end in zip(chosen, (0, *inner), (*inner, layers), strict=True))
        for stages in range(1, min(layers, gpus) + 1)
        for chosen in combinations(range(gpus), stages)
        for inner in combinations(range(1, layers), stages - 1)
    ]


def blocks_of(problem: Problem, cuts: Cuts) -> int:
    """The most blocks that every stage of a split has room for, by counting up."""
    blocks = 0
    while blocks < WORKLOAD.most_blocks and all(
        problem.need(cut, blocks + 1) <= problem.budgets[cut.device] for cut in cuts
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


@given(models(), devices, st.sampled_from(GOALS))
def test_the_solver_equals_brute_force(model: Footprint, gpus: tuple[Gpu, ...], goal: Goal) -> None:
    problem = as_problem(model, gpus)
    possible = [(cuts, n) for cuts in splits(problem.layers, len(gpus)) if (n := blocks_of(problem, cuts))]
    found = problem.best(goal)
    if not possible:
        assert found is None
        return
    assert found is not None
    cuts, blocks = found
    fastest = min(max(problem.time(cut) for cut in other) for other, _ in possible)
    scores = [s for other, n in possible if (s := score(problem, goal, other, n, fastest)) is not None]
    assert blocks_of(problem, cuts) >= blocks
    assert score(problem, goal, cuts, blocks, fastest) == min(scores)


def outcome(
    model: Footprint, gpus: tuple[Gpu, ...], goal: Goal = "throughput", caps: dict[int, int] | None = None
) -> Plan | DoesNotFit:
    try:
        return solve(
            model,
            gpus,
            block_size=WORKLOAD.block_size,
            max_batch_tokens=WORKLOAD.max_batch_tokens,
            max_sequences=WORKLOAD.max_sequences,
            max_context=WORKLOAD.max_context,
            max_memory=caps,
            goal=goal,
        )
    except DoesNotFit as error:
        return error


@given(models(), devices, st.sampled_from(GOALS))
def test_every_plan_is_whole_and_within_its_budgets(model: Footprint, gpus: tuple[Gpu, ...], goal: Goal) -> None:
    plan = outcome(model, gpus, goal)
    if isinstance(plan, DoesNotFit):
        return
    placed = [name for stage in plan.stages for name in stage.modules]
    assert sorted(placed) == sorted(module.name for module in model.modules)
    assert [stage.device for stage in plan.stages] == sorted({stage.device for stage in plan.stages})
    by_name = {module.name: module for module in model.modules}
    for stage in plan.stages:
        held = [by_name[name] for name in (*stage.modules, *stage.copies)]
        distinct = {t.storage: t.bytes for module in held for t in module.tensors}
        assert stage.weight_bytes == sum(distinct.values())
        assert "rotary" in stage.modules + stage.copies
        assert stage.weight_bytes + stage.reserve_bytes + plan.kv_bytes(stage) <= stage.budget_bytes
        assert stage.budget_bytes <= gpus[stage.device].memory_bytes
        assert plan.unused_bytes(stage) >= 0
    assert plan.num_blocks >= 1
    assert plan.max_context <= plan.capacity_tokens
    assert from_json(to_json(plan)) == plan
    assert outcome(model, gpus, goal) == plan


@given(models(), devices, st.integers(0, 500))
def test_more_memory_never_lowers_capacity(model: Footprint, gpus: tuple[Gpu, ...], more: int) -> None:
    roomier = tuple(replace(gpu, memory_bytes=gpu.memory_bytes + more) for gpu in gpus)
    before, after = outcome(model, gpus, "capacity"), outcome(model, roomier, "capacity")
    if isinstance(before, Plan):
        assert isinstance(after, Plan)
        assert after.num_blocks >= before.num_blocks


@given(models(), devices)
def test_exported_caps_still_fit(model: Footprint, gpus: tuple[Gpu, ...]) -> None:
    plan = outcome(model, gpus, "capacity")
    if isinstance(plan, Plan):
        capped = outcome(model, gpus, "capacity", dict.fromkeys(range(len(gpus)), 0) | max_memory(plan))
        assert isinstance(capped, Plan)
        assert capped.num_blocks == plan.num_blocks


@given(models(), devices)
def test_what_is_said_to_be_missing_is_enough(model: Footprint, gpus: tuple[Gpu, ...]) -> None:
    error = outcome(model, gpus)
    if isinstance(error, DoesNotFit):
        assert "\n" not in str(error)
        assert error.have == tuple(gpu.memory_bytes for gpu in gpus)
        each = list(zip(gpus, error.need, error.have, strict=True))
        assert any(need > have for _, need, have in each)
        mended = tuple(replace(gpu, memory_bytes=max(need, have)) for gpu, need, have in each)
        assert isinstance(outcome(model, mended), Plan)
