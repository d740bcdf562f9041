"""The attention contract on FlashInfer's kernels, eager and in CUDA graphs.

One command tells all: `pytest tests/gpu/test_attention_flashinfer.py -s`. The kernels are compiled first, all at once;
that takes minutes on a machine whose cache has none, and the tests themselves about one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from deployments.engine.attention_flashinfer import FlashInferAttention, Limits, flashinfer_backends
from deployments.engine.attention_tables import Shape
from deployments.engine.flashinfer_fit import Kind, fills, why_not, why_not_here
from deployments.engine.flashinfer_kernels import FlashInferKernels
from tests.contract.attention_cases import (
    CASES,
    FP8,
    Bounds,
    Case,
    Layer,
    Spans,
    World,
    decodes,
    left_over,
    prefills,
    shared_prefix,
)

BF16, FP16 = torch.bfloat16, torch.float16
MISSING = "no CUDA device" if not torch.cuda.is_available() else why_not_here()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(MISSING is not None, reason=f"needs FlashInfer on a GPU: {MISSING}"),
    pytest.mark.filterwarnings("default"),  # FlashInfer's imports warn, and we don't write them
]

GPU = torch.device("cuda", 0)
GEMMA = CASES["layers of two kinds"].layers


def limits(bounds: Bounds) -> Limits:
    return Limits(bounds.max_sequences, bounds.max_rows, bounds.max_blocks_per_sequence)


def make(bounds: Bounds) -> FlashInferAttention:
    stages = [(GPU, FlashInferKernels(GPU))]
    return flashinfer_backends(bounds.block_size, bounds.num_blocks, limits(bounds), stages)[0]


def kinds(case: Case, dtype: torch.dtype) -> list[Kind]:
    stored, kept = case.stored or case.head_dim, case.kv_dtype or dtype
    return [Kind(n.kv_heads * n.group, n.kv_heads, stored, dtype, kept, n.window, n.softcap) for n in case.layers]


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    """Compile what all tests need, in parallel."""
    wanted = [kind for case in CASES.values() for kind in kinds(case, BF16)] + kinds(CASES["decodes and chunks"], FP16)
    assert [why_not(kind) for kind in wanted if why_not(kind)] == []
    began = time.monotonic()
    FlashInferKernels(GPU).compile(wanted, lambda message: print(f"[{time.monotonic() - began:5.0f} s] {message}"))


@pytest.mark.parametrize("case", CASES)
def test_equals_plain_attention(case: str) -> None:
    CASES[case].check(make, GPU, BF16)


def test_equals_plain_attention_in_float16() -> None:
    CASES["decodes and chunks"].check(make, GPU, FP16)


@pytest.mark.parametrize("layer", [Layer(), Layer(2, 4), Layer(2, 4, window=24)], ids=str)
def test_what_another_request_left_does_not_spread(layer: Layer) -> None:
    """Blocks are not cleared: what lies behind a sequence's last token is masked by its length alone."""
    left_over(make, GPU, BF16, layer)


def test_sequences_share_their_first_blocks() -> None:
    shared_prefix(make, GPU, BF16)


LONG = (3000, 70, 5001, 1, 777)


@pytest.mark.parametrize(
    ("layer", "kv_dtype"),
    [
        (Layer(), None),
        (Layer(8, 4), None),
        (Layer(8, 4, window=1024), None),
        (GEMMA[0], None),
        (Layer(8, 4), FP8),
        (Layer(2, 1), FP8),
    ],
    ids=str,
)
def test_long_sequences_are_split_and_merged(layer: Layer, kv_dtype: torch.dtype | None) -> None:
    """A few tokens behind thousands: decodes alone, and beside a chunk."""
    chunk = [(0, 2900, 60), (1, 67, 1), (2, 4990, 8), (3, 0, 1), (4, 700, 40)]
    past = [(0, 0, 2900), (1, 0, 67), (2, 0, 4990), (4, 0, 700)]
    rest = [(0, 2960, 1), (1, 68, 1), (2, 4998, 1), (4, 740, 1)]
    world = Case(LONG, (past,), (layer,), kv_dtype=kv_dtype).world(make, GPU, BF16)
    world.step(past)
    world.check(chunk)
    world.check(rest)


class Graph:
    """Steps of up to `rows` rows through all layers of a world, captured once and replayed.

    Args:
        sequences: of steps with chunks, one for padding included; None: the steps are decodes.
        decodes: of these, for decodes, one more than there may be.
    """

    def __init__(self, world: World, rows: int, sequences: int | None = None, decodes: int | None = None) -> None:
        self.world, self.rows, self.room = world, rows, (sequences, decodes)
        self.inputs = [world.inputs(i, [(0, 0, 1)], rows - 1) for i in range(len(world.layers))]
        self.world.backend.prepare(world.layout([(0, 0, 1)], rows - 1, *self.room))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        self.graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), world.backend.step():
            with torch.cuda.stream(side):
                self._forward()
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(self.graph):
                self.outs = self._forward()

    def _forward(self) -> list[Tensor]:
        return [self.world.attend(i, inputs) for i, inputs in enumerate(self.inputs)]

    def check(self, spans: Spans) -> None:
        used = sum(count for _, _, count in spans)
        padding = self.rows - used
        self.world.backend.prepare(self.world.layout(spans, padding, *self.room))
        for layer, static in enumerate(self.inputs):
            for old, new in zip(static, self.world.inputs(layer, spans, padding), strict=True):
                old.copy_(new)
        self.graph.replay()
        for layer, out in enumerate(self.outs):
            self.world.compare(layer, spans, out[:used])


def without_ours(bounds: Bounds) -> FlashInferAttention:
    """As where Triton finds no C compiler: decodes are FlashInfer's too."""
    kernels = FlashInferKernels(GPU)
    kernels._own = False
    return flashinfer_backends(bounds.block_size, bounds.num_blocks, limits(bounds), [(GPU, kernels)])[0]


def graphed(
    case: Case, rows: Sequence[int], make: Callable[[Bounds], FlashInferAttention] = make
) -> tuple[World, dict[int, Graph]]:
    """The case's past written, and a graph for each of the sizes, all over the same buffers."""
    world = case.world(make, GPU, BF16)
    world.step([(0, 0, 1)])
    graphs = {n: Graph(world, n) for n in rows}
    world.step(case.steps[0])
    return world, graphs


@pytest.mark.parametrize(
    ("layers", "kv_dtype"),
    [
        ((Layer(),), None),
        ((Layer(2, 4),), None),
        ((Layer(8, 4),), None),
        ((Layer(2, 4, window=24), Layer(2, 4)), None),
        (GEMMA, None),
        ((Layer(2, 4),), FP8),
        ((Layer(2, 1),), FP8),
    ],
    ids=str,
)
def test_a_captured_decode_serves_every_later_one(layers: tuple[Layer, ...], kv_dtype: torch.dtype | None) -> None:
    """Captured over scratch rows; replayed with other sequences, lengths and padding, in any order of sizes."""
    lengths = (2500, 90, 17, 300, 33, 1200, 5)
    case = Case(lengths, (prefills(lengths, 4),), layers, kv_dtype=kv_dtype, padding=8)
    _, graphs = graphed(case, (8, 4, 1))
    graphs[8].check(decodes(lengths, 4))
    graphs[4].check(decodes(lengths, 3)[:3])
    graphs[1].check(decodes(lengths, 3)[5:6])
    graphs[8].check([span for i, span in enumerate(decodes(lengths, 3)) if i in (3, 4, 6)])
    graphs[8].check(decodes(lengths, 2))


@pytest.mark.parametrize("layers", [(Layer(),), (Layer(8, 4),), (Layer(2, 4, window=24), Layer(2, 4)), GEMMA], ids=str)
def test_a_captured_step_with_chunks_serves_every_later_one(layers: tuple[Layer, ...]) -> None:
    """Between decodes of more sequences than it has: what their plans leave behind must not be taken for its own."""
    lengths = (2500, 90, 17, 300, 33, 1200) + (40,) * 26
    case = Case(lengths, (prefills(lengths, 10),), layers, padding=40)
    world, decoding = graphed(case, (32,))
    small, large = Graph(world, 16, 5), Graph(world, 64, 12)
    for replay in range(2):
        back = 10 - 4 * replay
        decoding[32].check(decodes(lengths, back))
        small.check([(0, lengths[0] - back + 1, 2), (3, lengths[3] - back + 1, 1), (4, 33 - back + 1, 2)])
        decoding[32].check([(i, length - back + 1, 1) for i, length in enumerate(lengths) if i not in (0, 3, 4)])
        large.check(
            [(0, lengths[0] - back + 3, 1), (1, 90 - back + 2, 2), *[(i, 40 - back + 2, 2) for i in range(6, 14)]]
        )
        for i, length in enumerate(lengths):
            world.step([(i, length - back, 4)])


@pytest.mark.parametrize(
    "layers", [(Layer(2, 1),), (Layer(8, 4),), (Layer(2, 4, window=24), Layer(2, 4)), GEMMA], ids=str
)
def test_a_captured_step_takes_decodes_apart(layers: tuple[Layer, ...]) -> None:
    """Any number of them beside any chunks, between other steps that plan into the same memory."""
    lengths = (2500, 90, 17, 300, 33, 1200) + (40,) * 26
    case = Case(lengths, (prefills(lengths, 10),), layers, padding=140)
    world, decoding = graphed(case, (32,))
    apart = Graph(world, 128, 34 + 12, 34)
    singles = decodes(lengths, 10)
    apart.check(singles)
    for i, length in enumerate(lengths):
        world.step([(i, length - 10, 4)])
    apart.check([*decodes(lengths, 6)[:5], (5, 1194, 3), (6, 34, 2), (7, 34, 1)])
    decoding[32].check(decodes(lengths, 7))
    apart.check([(0, 1000, 100)])
    apart.check([*decodes(lengths, 7)[1:], (0, 2400, 90)])
    world.check([*decodes(lengths, 7)[1:], (0, 2400, 90)])  # the same without a graph


def test_a_captured_decode_that_fills_the_device() -> None:
    """So many sequences that FlashInfer splits none, and runs without the merge that graphs bring otherwise."""
    sequences, kind = 160, Kind(32, 8, 128, BF16, BF16, None, None)
    sms = torch.cuda.get_device_properties(GPU).multi_processor_count
    assert fills(kind, sms, Shape(sequences, sequences, 0))
    lengths = (*(3 + (37 * i) % 90 for i in range(sequences)), 2000)
    case = Case(lengths, (prefills(lengths, 2),), (Layer(8, 4),))
    _, graphs = graphed(case, (sequences + 1,), without_ours)
    graphs[sequences + 1].check(decodes(lengths, 2))
    graphs[sequences + 1].check(decodes(lengths)[7:])


def test_preparing_never_waits_for_the_gpu() -> None:
    lengths = (300, 90, 17, 5)
    case = Case(lengths, (prefills(lengths, 8), prefills(lengths, 1)), (Layer(2, 4), Layer(2, 4, window=24)))
    world, graphs = graphed(case, (4,))
    spans = [decodes(lengths, back) for back in range(7, 0, -1)]
    layouts = [world.layout(step) for step in spans]
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second of cycles
    busy = torch.cuda.Event()
    busy.record()
    began = time.perf_counter()
    for layout in layouts:
        world.backend.prepare(layout)
        graphs[4].graph.replay()
    took = time.perf_counter() - began
    assert not busy.query(), f"the host waited: {took:.3f} s for {len(layouts)} steps"
    torch.cuda.synchronize()
    print(f"prepare and replay: {1e6 * took / len(layouts):.0f} us of the host per step of two kinds")
    world.step(case.steps[1])  # what the replays wrote was no sequence's
    graphs[4].check(spans[-1])


def test_a_kind_first_seen_in_a_capture_is_refused() -> None:
    world = Case((20, 9), (prefills((20, 9), 1),), (Layer(2, 4),)).world(make, GPU, BF16)
    spans = decodes((20, 9))
    world.backend.prepare(world.layout(spans))
    inputs = world.inputs(0, spans)
    with (
        pytest.raises(RuntimeError, match="first appears in a CUDA graph's capture"),
        torch.inference_mode(),
        world.backend.step(),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        world.attend(0, inputs)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")
def test_stages_on_two_gpus_share_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first GPU plans each step; of the first step only as a layer runs, which it has not seen before."""
    case = CASES["decodes and chunks, group of 8"]
    one = case.world(make, GPU, BF16)
    devices = [torch.device("cuda", i) for i in range(2)]
    kernels = [FlashInferKernels(device) for device in devices]
    stages = zip(devices, kernels, strict=True)
    backends = iter(flashinfer_backends(case.block_size, one.bounds.num_blocks, limits(one.bounds), stages))
    worlds = [case.world(lambda _: next(backends), device, BF16) for device in devices]
    assert kernels[0].model == kernels[1].model

    def never(*_: object) -> None:
        pytest.fail("the second GPU planned for itself")

    monkeypatch.setattr(kernels[1], "plan", never)
    for spans in case.steps:
        layout = worlds[0].layout(spans)
        for world, device in zip(worlds, devices, strict=True):
            with torch.cuda.device(device), torch.inference_mode():
                world.backend.prepare(layout)
                with world.backend.step():
                    world.compare(0, spans, world.attend(0, world.inputs(0, spans)))
        (step,) = layout.shared.values()
        few = all(count == 1 for _, _, count in spans)
        assert len(step.plans) == (not few)


def test_the_workspaces_suffice_for_the_largest_steps() -> None:
    """The most sequences, and the most rows, of heads like a 70B model's; FlashInfer refuses where they do not."""
    layer, lengths = Layer(8, 8), (100,) * 64 + (2048,)
    case = Case(lengths, ([(64, 0, 2048)],), (layer,))
    world = case.world(make, GPU, BF16)
    world.step([(64, 0, 2048)])
    for i in range(0, 64, 16):
        world.step([(j, 0, 100) for j in range(i, i + 16)])
    for count in (1, 2, 7, 33, 64):
        last = world.step(decodes(lengths[:count]))[0]
        world.compare(0, decodes(lengths[:1]), last[:1])
    mixed = [*decodes(lengths[:64]), (64, 1024, 1024)]
    world.compare(0, mixed[:1], world.step(mixed)[0][:1])
    assert isinstance(world.backend, FlashInferAttention)
    print(f"held beside the blocks: {world.backend.bytes / 2**20:.0f} MiB")
