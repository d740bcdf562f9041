"""The FlashInfer backend with kernels in plain PyTorch: tables, padding, plans, what stages share, what is refused."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from deployments.engine.attention import RowSpan, StepLayout
from deployments.engine.attention_flashinfer import FlashInferAttention, Limits, flashinfer_backends
from deployments.engine.attention_staging import HostStep, StagingPool
from deployments.engine.attention_tables import PARTS, Shape
from deployments.engine.flashinfer_fit import Kind
from tests.contract.attention_cases import (
    CASES,
    Bounds,
    Case,
    Layer,
    World,
    cases,
    decodes,
    left_over,
    prefills,
    shared_prefix,
)
from tests.fakes.kernels import FakeKernels

CPU = torch.device("cpu")
KIND = Kind(4, 2, 128, torch.float32, torch.float32, None, None)


def limits(bounds: Bounds) -> Limits:
    return Limits(bounds.max_sequences, bounds.max_rows, bounds.max_blocks_per_sequence)


def make(bounds: Bounds) -> FlashInferAttention:
    (backend,) = flashinfer_backends(bounds.block_size, bounds.num_blocks, limits(bounds), [(CPU, FakeKernels())])
    return backend


def kernels_of(world: World) -> FakeKernels:
    assert isinstance(world.backend, FlashInferAttention)
    kernels = world.backend._kernels
    assert isinstance(kernels, FakeKernels)
    return kernels


@pytest.mark.parametrize("case", CASES)
def test_equals_plain_attention(case: str) -> None:
    CASES[case].check(make, CPU, torch.float32)


@settings(deadline=None, max_examples=60)
@given(cases())
def test_equals_plain_attention_over_any_steps(case: Case) -> None:
    case.check(make, CPU, torch.float32)


def test_left_over_blocks_and_shared_ones() -> None:
    left_over(make, CPU, torch.float32, Layer())
    shared_prefix(make, CPU, torch.float32)


def test_one_plan_per_step_and_kind() -> None:
    """Two layers of each of two kinds; what differs in scale alone is of one kind."""
    layers = (Layer(), Layer(scale=0.3), Layer(window=9), Layer(window=9))
    case = replace(CASES["decodes and chunks"], layers=layers)
    kernels = kernels_of(case.check(make, CPU, torch.float32))
    assert len(kernels.compiled) == 2
    assert len(kernels.plans) == 2 * (len(case.steps) + 1), "one step has decodes before a chunk"
    assert {kind.window for kind, _ in kernels.plans} == {None, 9}


def test_decodes_before_a_chunk_are_planned_as_decodes() -> None:
    spans = [(1, 5, 1), (0, 37, 1), (2, 0, 20), (3, 0, 1)]
    case = Case((40, 8, 54, 2), ([(0, 0, 37), (1, 0, 5)], spans), (Layer(2, 1),))
    kernels = kernels_of(case.check(make, CPU, torch.float32))
    assert [method for _, method in kernels.plans] == ["prefill", "decode", "prefill"]
    assert [(shape.sequences, shape.rows, shape.before) for shape in kernels.shapes[1:]] == [(2, 2, 0), (2, 21, 2)]


@pytest.mark.parametrize("back", [2, 1])
def test_a_graph_has_room_for_decodes_apart(back: int) -> None:
    """However many of the rows are decodes, kernels are planned for as many sequences and rows."""
    lengths = (40, 8, 54, 2)
    world = Case(lengths, (), rows=128).world(make, CPU, torch.float32)
    world.step(prefills(lengths, back))
    mixed = [(0, 40 - back, 1), (1, 8 - back, 1), (2, 54 - back, back)]
    world.check(mixed, 128 - 2 - back, sequences=12, decodes=5)
    world.check([(2, 52, 2), (3, 0, 1)], 125, sequences=12, decodes=5)
    world.check([(3, 1, 1), *decodes(lengths)[:3]], 124, sequences=12, decodes=4)
    found = [(shape.sequences, shape.rows, shape.before, shape.captured) for shape in kernels_of(world).shapes[1:]]
    before = 2 if back == 2 else 3  # the last of three single rows is one more decode
    assert found == [
        *((5, 5, 0, True), (7, 128, before, True)),
        *((5, 5, 0, True), (7, 128, 0, True)),
        *((4, 4, 0, True), (8, 128, 3, True)),
    ]


def test_few_heads_per_kv_head_decode_on_cuda_cores() -> None:
    methods = {}
    for group in (1, 3, 4, 8):
        world = Case((9, 7), (prefills((9, 7), 1), decodes((9, 7))), (Layer(1, group),)).check(make, CPU, torch.float32)
        methods[group] = [method for _, method in kernels_of(world).plans]
    assert methods == {
        1: ["prefill", "decode"],
        3: ["prefill", "decode"],
        4: ["prefill", "prefill"],
        8: ["prefill", "prefill"],
    }


def two_stages(models: tuple[str, str] = ("fake GPU", "fake GPU")) -> tuple[list[World], list[FakeKernels]]:
    """Two stages of one layer each, over the same sequences."""
    case = CASES["decodes and chunks"]
    kernels = [FakeKernels(model) for model in models]
    rows = max(sum(count for *_, count in spans) for spans in case.steps)
    bounds = Limits(len(case.lengths), rows, -(-max(case.lengths) // case.block_size))
    one = case.world(make, CPU, torch.float32)
    blocks = (one.bounds.block_size, one.bounds.num_blocks)
    backends = iter(flashinfer_backends(*blocks, bounds, [(CPU, each) for each in kernels]))
    return [case.world(lambda _: next(backends), CPU, torch.float32) for _ in models], kernels


def check_both(worlds: list[World]) -> None:
    for spans in CASES["decodes and chunks"].steps:
        layout = worlds[0].layout(spans)
        for world in worlds:
            world.backend.prepare(layout)
            with world.backend.step(), torch.inference_mode():
                world.compare(0, spans, world.attend(0, world.inputs(0, spans)))


def test_stages_share_tables_and_plans() -> None:
    worlds, kernels = two_stages()
    check_both(worlds)
    steps = len(CASES["decodes and chunks"].steps)
    assert [len(each.plans) for each in kernels] == [steps + 1, 0], "the second stage copies"


def test_gpus_of_unlike_models_plan_for_themselves() -> None:
    worlds, kernels = two_stages(("big GPU", "small GPU"))
    check_both(worlds)
    steps = len(CASES["decodes and chunks"].steps)
    assert [len(each.plans) for each in kernels] == [steps + 1, steps + 1]


def test_warm_tells_and_compiles_once() -> None:
    world = CASES["one token"].world(make, CPU, torch.float32)
    told: list[str] = []
    assert isinstance(world.backend, FlashInferAttention)
    world.backend.warm([KIND, KIND], told.append)
    world.backend.warm([KIND], told.append)
    world.check([(0, 0, 1)])
    assert told == ["compiled 128"]
    assert kernels_of(world).compiled == [KIND]


def test_bytes_count_all_that_is_held() -> None:
    bounds = Limits(2, 5, 3)
    (backend,) = flashinfer_backends(4, 6, bounds, [(CPU, FakeKernels())])
    tables = 4 * bounds.table_size
    assert backend.bytes == tables
    run_one_row(backend)
    assert backend.bytes == tables + 4 * 5 * 4 + PARTS * 4 * (1 + 5)


def run_one_row(backend: FlashInferAttention, rows: int = 1, *, window: int | None = None, **layout: Any) -> None:
    blocks = torch.zeros(7, 4, 2, 64)
    query, key = torch.ones(1, 4, rows, 64), torch.ones(1, 2, rows, 64)
    backend.prepare(StepLayout((RowSpan(0, 1, (0,)),), 4, **layout))
    with backend.step(), torch.inference_mode():
        torch.ops.headroom.paged_attention(query, key, key, blocks, blocks.clone(), 1.0, window, None)


def one_backend(bounds: Limits, kernels: FakeKernels | None = None) -> FlashInferAttention:
    return flashinfer_backends(4, 6, bounds, [(CPU, kernels or FakeKernels())])[0]


def test_the_largest_step_fits_and_a_larger_one_is_refused() -> None:
    """3 sequences of 9 tokens, and 2 rows of padding."""
    bounds = Limits(3, 5, 3)
    spans = tuple(RowSpan(8, 1, (0, 1, 2)) for _ in range(3))
    one_backend(bounds).prepare(StepLayout(spans, 4, padding=2))
    with pytest.raises(ValueError, match=r"6 rows.*made for"):
        one_backend(bounds).prepare(StepLayout(spans, 4, padding=3))
    with pytest.raises(ValueError, match="a step has 6 rows, and attention was made for 5"):
        one_backend(Limits(9, 5, 9)).prepare(StepLayout((RowSpan(0, 6, (0, 1)),), 4))
    with pytest.raises(ValueError, match="the block tables of 4 sequences with 4 rows and 40 blocks"):
        one_backend(bounds).prepare(StepLayout((RowSpan(39, 1, tuple(range(10))),) * 4, 4))


def test_rows_are_those_prepared_for() -> None:
    with pytest.raises(ValueError, match="attention got 2 rows in a step that was prepared for 1"):
        run_one_row(one_backend(Limits(2, 5, 3)), rows=2)


def test_a_plan_that_a_graph_would_misread_is_refused() -> None:
    kernels = FakeKernels()
    kernels.moody = True
    backend = one_backend(Limits(2, 5, 3), kernels)
    run_one_row(backend)
    with pytest.raises(
        RuntimeError, match=r"plans 1 rows of 1 sequences as \[1, 2\], where it planned \[1, 1\] before"
    ):
        run_one_row(backend)


def test_unprepared_is_a_mistake() -> None:
    backend = one_backend(Limits(2, 5, 3))
    rows, blocks = torch.zeros(1, 1, 1, 64), torch.zeros(2, 4, 1, 64)
    with pytest.raises(RuntimeError, match="no step was prepared"), backend.step():
        torch.ops.headroom.paged_attention(rows, rows, rows, blocks, blocks.clone(), 1.0, None, None)


class Copying:
    """A CUDA event."""

    done = False

    def query(self) -> bool:
        return self.done


def test_staging_is_used_again_once_its_step_and_its_copies_are_over() -> None:
    pool = StagingPool(Limits(2, 5, 3).table_size, pinned=False)
    backend = FlashInferAttention(4, 6, Limits(2, 5, 3), CPU, FakeKernels(), pool)
    run_one_row(backend)
    run_one_row(backend)
    assert len(pool) == 2, "the backend still holds the step before when it prepares the next"
    for _ in range(5):
        run_one_row(backend)
    assert len(pool) == 2
    copying = Copying()
    for staging in pool._all:
        staging.copied[CPU] = copying  # type: ignore[assignment]  # all that is used of an event
    run_one_row(backend)
    assert len(pool) == 3, "the host does not wait for copies"
    copying.done = True
    for _ in range(5):
        run_one_row(backend)
    assert len(pool) == 3


def test_each_step_s_copy_is_noted_by_one_event_of_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Noting] = []

    def event() -> Noting:
        made.append(Noting())
        return made[-1]

    monkeypatch.setattr(torch.cuda, "Event", event)
    pool = StagingPool(Limits(2, 5, 3).table_size, pinned=False)
    backend = FlashInferAttention(4, 6, Limits(2, 5, 3), CPU, FakeKernels(), pool)
    backend._stream = stream = object()  # type: ignore[assignment]  # as on a GPU
    for count in (1, 2, 3, 4):
        run_one_row(backend)
        assert len(pool) == len(made) == count, "what is being copied is not written"
    for _ in range(9):
        for event in made:
            event.done = True
        run_one_row(backend)
        assert sum(not event.done for event in made) == 1, "noted anew"
    assert len(pool) == len(made) == 4
    assert {noted for event in made for noted in event.streams} == {stream}


class Noting(Copying):
    def __init__(self) -> None:
        self.streams: list[object] = []

    def record(self, stream: object) -> None:
        self.done = False
        self.streams.append(stream)


def test_the_staging_taken_longest_ago_comes_next() -> None:
    """Its copies are the first to be over: no other is asked."""
    pool = StagingPool(8, pinned=False)
    kept = [HostStep(pool.take(), Shape(1, 1, 1)) for _ in range(3)]
    order = [step.staging for step in kept]
    for step in kept:
        step.staging.step = weakref.ref(step)
    del kept, step
    assert [pool.take() for _ in range(7)] == [*order, *order, order[0]]


def test_a_kind_that_comes_later_is_planned_in_steps_that_needed_no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept of a step of so many decodes is of the kinds that there were."""
    kernels = FakeKernels()
    monkeypatch.setattr(kernels, "takes_decodes", lambda kind, *_: kind.window is None)
    backend = one_backend(Limits(2, 5, 3), kernels)
    plans = []
    for window in (None, None, 2, 2, None):
        run_one_row(backend, window=window)
        plans.append(len(kernels.plans))
    assert plans == [0, 0, 1, 2, 3]


def test_a_layout_kept_keeps_its_staging() -> None:
    """The next stage may prepare for it much later."""
    pool = StagingPool(Limits(2, 5, 3).table_size, pinned=False)
    backend = FlashInferAttention(4, 6, Limits(2, 5, 3), CPU, FakeKernels(), pool)
    kept = [StepLayout((RowSpan(0, 1, (i,)),), 4) for i in range(4)]
    for layout in kept:
        backend.prepare(layout)
    assert len(pool) == 4
    pages = [next(iter(layout.shared.values())).parts[0].pages[0].item() for layout in kept]
    assert pages == [0, 1, 2, 3]


def test_table_size_is_that_of_the_largest_step() -> None:
    assert Limits(3, 5, 4).table_size == Shape(5, 5, 3 * 4 + 5).size


def make_own(bounds: Bounds) -> FlashInferAttention:
    backend = make(bounds)
    assert isinstance(backend._kernels, FakeKernels)
    backend._kernels.own = 5
    return backend


@pytest.mark.parametrize("case", CASES)
def test_equals_plain_attention_with_decodes_of_our_own(case: str) -> None:
    CASES[case].check(make_own, CPU, torch.float32)


def test_decodes_are_one_kernel() -> None:
    """Beside chunks too, in a graph or not, and they need no plan; those of more sequences than it takes are not."""
    lengths = (40, 8, 54, 2)
    world = Case(lengths, (), (Layer(2, 4),), rows=128).world(make_own, CPU, torch.float32)
    world.step(prefills(lengths, 3))
    kernels = kernels_of(world)
    world.check([(0, 37, 1), (1, 5, 1), (2, 51, 3)])
    assert kernels.own_rows == [2]
    world.step([(3, 0, 1)])
    plans = len(kernels.plans)
    world.check([(0, 38, 1), (1, 6, 1)], 1)
    assert kernels.own_rows == [2, 1, 3], "one of them is padding"
    assert len(kernels.plans) == plans
    world.check([(0, 39, 1), (1, 7, 1), (3, 1, 1)], 3)
    assert kernels.own_rows == [2, 1, 3]
    assert len(kernels.plans) == plans + 1


def test_decodes_beside_chunks_in_a_graph_are_one_kernel() -> None:
    lengths = (40, 8, 54, 2)
    world = Case(lengths, (), rows=128).world(make_own, CPU, torch.float32)
    world.step(prefills(lengths, 2))
    world.check([(0, 38, 1), (1, 6, 1), (2, 52, 2)], 128 - 4, sequences=12, decodes=5)
    kernels = kernels_of(world)
    assert kernels.own_rows == [2]
    assert [shape.before for shape in kernels.shapes[-1:]] == [2]
    world.check([(2, 52, 2), (3, 0, 1)], 125, sequences=12, decodes=5)
    assert kernels.own_rows == [2, 0]


def test_a_graph_that_keeps_no_decodes_apart_is_no_decodes() -> None:
    """Though it has as many sequences as rows."""
    lengths = (40, 8, 54, 2)
    world = Case(lengths, (), rows=128).world(make_own, CPU, torch.float32)
    world.step(prefills(lengths, 4))
    world.check([(0, 36, 2), (1, 4, 2)], 1, sequences=5)
    assert kernels_of(world).own_rows == []


def test_decodes_on_two_stages() -> None:
    worlds, kernels = two_stages()
    for each in kernels:
        each.own = 8
    check_both(worlds)
    assert kernels[0].own_rows == kernels[1].own_rows != []
