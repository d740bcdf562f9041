"""What every attention backend must compute, as cases: sequences, the steps that compute them, and the truth.

The truth is the textbook's attention in float64, with the whole matrix of scores, over keys and values as the blocks
keep them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from hypothesis import strategies as st
from torch import Tensor

from deployments.engine.attention import AttentionBackend, PagedKv, RowSpan, StepLayout, paged_attention

Spans = list[tuple[int, int, int]]
"""Rows of a step: (sequence, start, count)."""
FP8 = torch.float8_e4m3fn
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 4e-2}
"""Bound on |got - truth|, with values drawn from a normal distribution."""


@dataclass(frozen=True)
class Layer:
    """One attention layer: its heads, and how it scores."""

    kv_heads: int = 2
    group: int = 2
    """Query heads per KV head."""
    window: int | None = None
    softcap: float | None = None
    scale: float | None = None


@dataclass(frozen=True)
class Bounds:
    """What a backend is made for."""

    num_blocks: int
    block_size: int
    max_sequences: int
    max_rows: int
    max_blocks_per_sequence: int
    device: torch.device


Factory = Callable[[Bounds], AttentionBackend]


@dataclass
class World:
    """Sequences with all of their queries, keys and values, in blocks that hold NaN wherever nobody wrote."""

    backend: AttentionBackend
    bounds: Bounds
    layers: tuple[Layer, ...]
    tables: list[tuple[int, ...]]
    lengths: list[int]
    head_dim: int
    dtype: torch.dtype
    kv_dtype: torch.dtype
    stored: int
    kv: list[PagedKv] = field(init=False)

    def __post_init__(self) -> None:
        draw = torch.Generator().manual_seed(sum(self.lengths) + self.bounds.block_size)
        self.queries = [self._draw(draw, layer.kv_heads * layer.group) for layer in self.layers]
        self.keys = [self._draw(draw, layer.kv_heads) for layer in self.layers]
        self.values = [self._draw(draw, layer.kv_heads) for layer in self.layers]
        shape = self.bounds.num_blocks, self.bounds.block_size
        self.kv = [
            PagedKv(*shape, layer.kv_heads, self.stored, self.kv_dtype, self.bounds.device) for layer in self.layers
        ]
        for cache in self.kv:
            for blocks in (cache.keys, cache.values):
                blocks[: cache.scratch] = torch.full_like(blocks[: cache.scratch], float("nan"), dtype=self.dtype)

    def _draw(self, draw: torch.Generator, heads: int) -> list[Tensor]:
        """[heads, n, head_dim] per sequence."""
        shapes = [(heads, n, self.head_dim) for n in self.lengths]
        return [torch.randn(shape, generator=draw).to(self.bounds.device, self.dtype) for shape in shapes]

    def layout(
        self, spans: Spans, padding: int = 0, sequences: int | None = None, decodes: int | None = None
    ) -> StepLayout:
        rows = tuple(RowSpan(start, count, self.tables[i]) for i, start, count in spans)
        return StepLayout(rows, self.bounds.block_size, padding, sequences, decodes)

    def inputs(self, layer: int, spans: Spans, padding: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of the step's rows, each [1, heads, rows + padding, head_dim]; padding is 1.0."""
        found = []
        for of in (self.queries, self.keys, self.values):
            rows = torch.cat([of[layer][i][:, start : start + count] for i, start, count in spans], dim=1)
            rows = torch.nn.functional.pad(rows, (0, 0, 0, padding), value=1.0)
            found.append(rows[None])
        return found[0], found[1], found[2]

    def attend(self, layer: int, inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """One layer's attention, through the hook: [rows, heads, head_dim]."""
        kind = self.layers[layer]
        out, weights = paged_attention(
            SimpleNamespace(headroom_kv=self.kv[layer]),  # type: ignore[arg-type]  # all that is read of a module
            *inputs,
            None,
            scaling=kind.scale,
            sliding_window=kind.window,
            softcap=kind.softcap,
        )
        assert weights is None
        return out[0]

    @torch.inference_mode()
    def step(
        self, spans: Spans, padding: int = 0, sequences: int | None = None, decodes: int | None = None
    ) -> list[Tensor]:
        """Prepare and attend, layer after layer: [rows, heads, head_dim] of each."""
        self.backend.prepare(self.layout(spans, padding, sequences, decodes))
        with self.backend.step():
            outs = [self.attend(i, self.inputs(i, spans, padding)) for i in range(len(self.layers))]
        return [out[: len(out) - padding] for out in outs]

    def check(self, spans: Spans, padding: int = 0, sequences: int | None = None, decodes: int | None = None) -> None:
        """Take the step, and compare each layer with the truth."""
        for layer, out in enumerate(self.step(spans, padding, sequences, decodes)):
            self.compare(layer, spans, out)

    def compare(self, layer: int, spans: Spans, out: Tensor) -> None:
        bound = TOLERANCE[self.dtype]
        torch.testing.assert_close(
            out.double(), self.truth(layer, spans), rtol=bound, atol=bound, msg=lambda m: f"layer {layer}, {m}"
        )

    def truth(self, layer: int, spans: Spans) -> Tensor:
        """float64 [rows, heads, head_dim]."""
        return torch.cat([self._attention(layer, *span) for span in spans])

    def _attention(self, layer: int, i: int, start: int, count: int) -> Tensor:
        kind, end = self.layers[layer], start + count
        query = self.queries[layer][i][:, start:end].double()
        keys, values = (
            of[layer][i][:, :end].to(self.kv_dtype).double().repeat_interleave(kind.group, dim=0)
            for of in (self.keys, self.values)
        )
        scores = query @ keys.transpose(1, 2) * (self.head_dim**-0.5 if kind.scale is None else kind.scale)
        if kind.softcap is not None:
            scores = kind.softcap * torch.tanh(scores / kind.softcap)
        position = torch.arange(end, device=self.bounds.device)
        behind = position[start:, None] - position[None]  # of each row, how far each key lies behind it
        unseen = (behind < 0) if kind.window is None else (behind < 0) | (behind >= kind.window)
        return (scores.masked_fill(unseen, float("-inf")).softmax(-1) @ values).transpose(0, 1)


@dataclass(frozen=True)
class Case:
    """Sequences and the steps over them, each of which is checked."""

    lengths: tuple[int, ...]
    steps: tuple[Spans, ...]
    layers: tuple[Layer, ...] = (Layer(),)
    block_size: int = 16
    head_dim: int = 128
    stored: int | None = None
    """Head size of the blocks; None: the same."""
    kv_dtype: torch.dtype | None = None
    """None: the compute dtype."""
    padding: int = 0
    rows: int | None = None
    """Rows of a graph for steps with chunks: every step is padded to so many, and to `sequences` in all."""
    sequences: int | None = None
    decodes: int | None = None
    """Of these, for decodes."""

    def world(self, factory: Factory, device: torch.device, dtype: torch.dtype, *, spare: int = 2) -> World:
        """Blocks are dealt out from both ends in turn, so that no table is in order."""
        needs = [-(-length // self.block_size) for length in self.lengths]
        blocks = sum(needs) + spare
        ends = sorted(range(blocks), key=lambda b: (min(b, blocks - 1 - b), b))
        ids = iter(ends)
        rows = self.rows or max(sum(count for _, _, count in spans) for spans in self.steps) + self.padding
        bounds = Bounds(blocks, self.block_size, len(self.lengths), rows, max(needs), device)
        tables = [tuple(next(ids) for _ in range(need)) for need in needs]
        return World(
            factory(bounds),
            bounds,
            self.layers,
            tables,
            list(self.lengths),
            self.head_dim,
            dtype,
            self.kv_dtype or dtype,
            self.stored or self.head_dim,
        )

    def check(self, factory: Factory, device: torch.device, dtype: torch.dtype) -> World:
        """Run the steps, comparing each with the truth."""
        world = self.world(factory, device, dtype)
        for spans in self.steps:
            padding = self.padding if self.rows is None else self.rows - sum(count for _, _, count in spans)
            world.check(spans, padding, self.sequences, self.decodes)
        return world


def prefills(lengths: tuple[int, ...], short: int = 0) -> Spans:
    """Whole prompts, `short` tokens left for later."""
    return [(i, 0, length - short) for i, length in enumerate(lengths) if length > short]


def decodes(lengths: tuple[int, ...], back: int = 1) -> Spans:
    """One token of each sequence, the `back`-th from its end."""
    return [(i, length - back, 1) for i, length in enumerate(lengths)]


def life(*lengths: int) -> tuple[Spans, ...]:
    """Prefills, then two decodes of every sequence."""
    return (prefills(lengths, 2), decodes(lengths, 2), decodes(lengths))


_MIXED: tuple[Spans, ...] = (
    [(0, 0, 37), (1, 0, 5)],
    [(1, 5, 1), (2, 0, 20), (0, 37, 1)],
    [(2, 20, 33), (0, 38, 1), (1, 6, 1), (3, 0, 1)],
    [(3, 1, 1), (1, 7, 1), (2, 53, 1), (0, 39, 1)],
)
_APART: tuple[Spans, ...] = (
    [(0, 0, 37), (1, 0, 5)],
    [(1, 5, 1), (0, 37, 1), (2, 0, 20)],
    [(0, 38, 1), (1, 6, 1), (3, 0, 1), (2, 20, 33)],
    [(3, 1, 1), (1, 7, 1), (2, 53, 1), (0, 39, 1)],
)
"""Decodes first, one more than there is room for among them."""
_GEMMA = (Layer(2, 4, window=24, softcap=50.0, scale=0.09), Layer(2, 4, softcap=50.0, scale=0.09))
_UNLIKE = (Layer(4, 1), Layer(1, 4), Layer(2, 2, window=9))
_LENGTHS = (40, 8, 54, 2)

# Few kinds of kernels among the cases: FlashInfer takes a minute to compile one.
CASES: dict[str, Case] = {
    "one token": Case((1,), ([(0, 0, 1)],)),
    "decodes of unlike length": Case((9, 40, 17, 3, 33), life(9, 40, 17, 3, 33)),
    "decodes and chunks": Case(_LENGTHS, _MIXED),
    "decodes and chunks, group of 8": Case(_LENGTHS, _MIXED, (Layer(2, 8),)),
    "no grouping": Case(_LENGTHS, _MIXED, (Layer(4, 1),)),
    "group of 3": Case((9, 40, 17), life(9, 40, 17), (Layer(1, 3),)),
    "group of 5": Case((9, 40, 17), life(9, 40, 17), (Layer(1, 5),)),
    "one KV head, group of 32": Case(_LENGTHS, _MIXED, (Layer(1, 32),)),
    "head size 64": Case(_LENGTHS, _MIXED, (Layer(2, 4),), head_dim=64),
    "head size 256": Case(_LENGTHS, _MIXED, (Layer(1, 8),), head_dim=256),
    "head size 256, no grouping": Case(_LENGTHS, _MIXED, (Layer(2, 1),), head_dim=256),
    "heads of 80 in 128": Case(_LENGTHS, _MIXED, (Layer(2, 4),), head_dim=80, stored=128),
    "heads of 96 in 128, no grouping": Case(_LENGTHS, _APART, (Layer(4, 1),), head_dim=96, stored=128),
    "heads of 64 in 128, fp8 blocks": Case(_LENGTHS, _MIXED, (Layer(2, 4),), head_dim=64, stored=128, kv_dtype=FP8),
    "pages of 1": Case(_LENGTHS, _MIXED, block_size=1),
    "pages of 8": Case(_LENGTHS, _MIXED, (Layer(2, 4),), block_size=8),
    "pages of 64": Case(_LENGTHS, _MIXED, (Layer(2, 4),), block_size=64),
    "a window": Case(_LENGTHS, _MIXED, (Layer(window=24),)),
    "a window, group of 4": Case(_LENGTHS, _MIXED, (Layer(2, 4, window=24),)),
    "a window of 1": Case(_LENGTHS, _MIXED, (Layer(2, 4, window=1),)),
    "a soft cap": Case(_LENGTHS, _MIXED, (Layer(2, 4, softcap=5.0),)),
    "a scale": Case(_LENGTHS, _MIXED, (Layer(scale=0.3),)),
    "layers of two kinds": Case(_LENGTHS, _MIXED, _GEMMA),
    "layers with unlike heads": Case(_LENGTHS, _MIXED, _UNLIKE),
    "padded decodes": Case((9, 40, 17), life(9, 40, 17), padding=5),
    "padded decodes, group of 4": Case((9, 40, 17), life(9, 40, 17), (Layer(2, 4),), padding=5),
    "a padded mixed step": Case(_LENGTHS, _MIXED, (Layer(2, 4),), padding=3),
    "steps of one graph's size": Case(_LENGTHS, _MIXED, (Layer(2, 4),), rows=64, sequences=9),
    "steps of one graph's size, decodes apart": Case(
        _LENGTHS, _APART, (Layer(2, 4),), rows=64, sequences=12, decodes=3
    ),
    "steps of one graph's size, full": Case(_LENGTHS, _MIXED, (Layer(2, 2, window=9),), rows=42, sequences=5),
    "fp8 blocks": Case(_LENGTHS, _MIXED, (Layer(2, 4),), kv_dtype=FP8),
    "fp8 blocks, no grouping": Case(_LENGTHS, _MIXED, (Layer(2, 1),), kv_dtype=FP8),
}


@st.composite
def cases(draw: st.DrawFn, head_dim: int = 8) -> Case:
    """Any sequences: a step that writes every past, and the step under test, rows in any order."""
    parts = draw(st.lists(st.tuples(st.integers(0, 20), st.sampled_from((1, 1, 1, 2, 9))), min_size=1, max_size=6))
    order = draw(st.permutations(range(len(parts))))
    past = [(i, 0, parts[i][0]) for i in order if parts[i][0]]
    now = [(i, *parts[i]) for i in order]
    layer = Layer(
        kv_heads=draw(st.sampled_from((1, 2, 3))),
        group=draw(st.sampled_from((1, 2, 4))),
        window=draw(st.none() | st.integers(1, 24)),
        softcap=draw(st.none() | st.sampled_from((0.5, 5.0))),
        scale=draw(st.none() | st.just(0.3)),
    )
    return Case(
        tuple(start + count for start, count in parts),
        (past, now) if past else (now,),
        (layer,),
        block_size=draw(st.sampled_from((1, 2, 4, 16))),
        head_dim=head_dim,
        padding=draw(st.sampled_from((0, 0, 3))),
    )


def left_over(factory: Factory, device: torch.device, dtype: torch.dtype, layer: Layer) -> None:
    """Blocks that another request filled with NaN, taken anew, with tails that stay unwritten."""
    case = Case((21, 6, 40), life(21, 6, 40), (layer,))
    world = case.check(factory, device, dtype)
    for cache in world.kv:
        assert cache.keys[: cache.scratch].isnan().any(), "the case shows nothing when no block holds NaN"
    for value in (float("nan"), float("inf")):
        for cache in world.kv:
            for blocks in (cache.keys, cache.values):
                blocks[: cache.scratch] = value
        for spans in case.steps:
            world.check(spans)


def shared_prefix(factory: Factory, device: torch.device, dtype: torch.dtype) -> None:
    """Sequences whose first blocks are the same: together their tables name more blocks than there are."""
    lengths = (45, 46, 47, 45, 48)
    case = Case(lengths, (prefills(lengths),), (Layer(2, 4),))
    world = case.world(factory, device, dtype)
    head = world.tables[0][:2]
    world.tables = [head + table[2:] for table in world.tables]
    for of in (world.keys[0], world.values[0]):
        for rows in of[1:]:
            rows[:, :32] = of[0][:, :32]
    world.check([(0, 0, 44)])
    world.check([(i, 32, length - 33) for i, length in enumerate(lengths) if i])
    world.check(decodes(lengths))
