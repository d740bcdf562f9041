"""Paged attention against a plain attention in float64; its geometry; what it refuses."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deployments.engine.attention import (
    Geometry,
    PagedKv,
    RowSpan,
    UnsupportedAttention,
    build_geometry,
    paged_attention,
)

CPU = torch.device("cpu")
HEAD_DIM = 8


@dataclass
class World:
    """Some sequences with all of their queries, keys and values, and a cache that holds NaN wherever nobody wrote."""

    block_size: int
    kv_heads: int
    shared_heads: int
    tables: list[tuple[int, ...]]
    lengths: list[int]
    blocks: int
    window: int | None = None
    softcap: float | None = None
    scale: float | None = None

    def __post_init__(self) -> None:
        draw = torch.Generator().manual_seed(sum(self.lengths) + self.block_size)
        heads = self.kv_heads * self.shared_heads
        self.queries = [torch.randn(heads, n, HEAD_DIM, generator=draw) for n in self.lengths]
        self.keys = [torch.randn(self.kv_heads, n, HEAD_DIM, generator=draw) for n in self.lengths]
        self.values = [torch.randn(self.kv_heads, n, HEAD_DIM, generator=draw) for n in self.lengths]
        self.kv = PagedKv(self.blocks, self.block_size, self.kv_heads, HEAD_DIM, torch.float32, CPU)
        self.kv.keys[: self.blocks] = self.kv.values[: self.blocks] = float("nan")

    def step(self, spans: list[tuple[int, int, int]]) -> Tensor:
        """Attend for rows (sequence, start, count): [rows, heads, head_dim]."""
        rows = [RowSpan(start, count, self.tables[i]) for i, start, count in spans]
        self.kv.geometry = build_geometry(rows, self.block_size, self.kv.scratch, CPU)
        cut = [slice(start, start + count) for _, start, count in spans]
        query, key, value = (
            torch.cat([of[i][:, rows] for (i, _, _), rows in zip(spans, cut, strict=True)], dim=1)[None]
            for of in (self.queries, self.keys, self.values)
        )
        out, weights = paged_attention(
            SimpleNamespace(headroom_kv=self.kv),
            query,
            key,
            value,
            None,
            scaling=self.scale,
            sliding_window=self.window,
            softcap=self.softcap,
        )
        assert weights is None
        return out[0]

    def reference(self, spans: list[tuple[int, int, int]]) -> Tensor:
        """The same, as the textbook says, one query at a time, in float64."""
        return torch.stack([self._one(i, p) for i, start, count in spans for p in range(start, start + count)])

    def _one(self, i: int, position: int) -> Tensor:
        first = 0 if self.window is None else max(0, position + 1 - self.window)
        keys, values = (
            t[i][:, first : position + 1].double().repeat_interleave(self.shared_heads, dim=0)
            for t in (self.keys, self.values)
        )
        scale = HEAD_DIM**-0.5 if self.scale is None else self.scale
        scores = (keys @ self.queries[i][:, position, :, None].double())[..., 0] * scale
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        return (scores.softmax(-1)[:, None] @ values)[:, 0]


@st.composite
def worlds(draw: st.DrawFn) -> tuple[World, list[tuple[int, int, int]], list[tuple[int, int, int]]]:
    """A world, the spans of a first step that writes every sequence's past, and those of the step under test."""
    block_size = draw(st.sampled_from((1, 2, 4, 16)))
    parts = draw(st.lists(st.tuples(st.integers(0, 20), st.sampled_from((1, 1, 1, 2, 9))), min_size=1, max_size=6))
    lengths = [start + count for start, count in parts]
    needs = [-(-length // block_size) for length in lengths]
    blocks = sum(needs) + draw(st.integers(0, 3))
    ids = iter(draw(st.permutations(range(blocks))))
    world = World(
        block_size,
        kv_heads=draw(st.sampled_from((1, 2, 3))),
        shared_heads=draw(st.sampled_from((1, 2, 4))),
        tables=[tuple(next(ids) for _ in range(need)) for need in needs],
        lengths=lengths,
        blocks=blocks,
        window=draw(st.none() | st.integers(1, 24)),
        softcap=draw(st.none() | st.sampled_from((0.5, 5.0))),
        scale=draw(st.none() | st.just(0.3)),
    )
    order = draw(st.permutations(range(len(parts))))
    past = [(i, 0, parts[i][0]) for i in order if parts[i][0]]
    return world, past, [(i, *parts[i]) for i in order]


@settings(deadline=None, max_examples=80)
@given(worlds())
def test_equals_plain_attention(case: tuple[World, list[tuple[int, int, int]], list[tuple[int, int, int]]]) -> None:
    world, *steps = case
    for spans in steps:
        if spans:
            torch.testing.assert_close(world.step(spans).double(), world.reference(spans), rtol=1e-4, atol=1e-5)


def decoding(lengths: list[int], block_size: int = 4) -> tuple[World, list[tuple[int, int, int]]]:
    """Sequences one token short of `lengths` whose past is written, and the spans of their next tokens."""
    needs = [-(-length // block_size) for length in lengths]
    ids = iter(range(sum(needs)))
    tables = [tuple(next(ids) for _ in range(need)) for need in needs]
    world = World(block_size, 2, 2, tables, lengths, blocks=sum(needs))
    if past := [(i, 0, length - 1) for i, length in enumerate(lengths) if length > 1]:
        world.step(past)
    return world, [(i, length - 1, 1) for i, length in enumerate(lengths)]


def geometry_of(world: World) -> Geometry:
    assert world.kv.geometry is not None
    return world.kv.geometry


def test_decodes_of_like_length_share_a_group() -> None:
    world, spans = decoding([9, 12, 40, 37, 2])
    torch.testing.assert_close(world.step(spans).double(), world.reference(spans), rtol=1e-4, atol=1e-5)
    groups = {tuple(group.rows.tolist()): group.width for group in geometry_of(world).decodes if group.rows is not None}
    assert groups == {(0, 1): 3, (2, 3): 10, (4,): 1}


def test_a_step_of_one_group_needs_no_row_index() -> None:
    world, spans = decoding([9, 12])
    world.step(spans)
    (group,) = geometry_of(world).decodes
    assert group.rows is None
    assert group.tables.tolist() == [0, 1, 2, 3, 4, 5]
    assert group.lengths.tolist() == [9, 12]


def test_a_prompt_of_one_token_is_a_decode_over_itself() -> None:
    world, spans = decoding([1])
    torch.testing.assert_close(world.step(spans).double(), world.reference(spans), rtol=1e-4, atol=1e-5)
    assert geometry_of(world).chunks == ()


def test_slots_follow_the_block_table() -> None:
    geometry = build_geometry([RowSpan(2, 3, (7, 5)), RowSpan(6, 1, (1, 0))], 4, 8, CPU)
    assert geometry.slots.tolist() == [30, 31, 20, 2]
    assert geometry.unwritten is not None
    assert geometry.unwritten.tolist() == [21, 22, 23]
    (chunk,) = geometry.chunks
    assert (chunk.first, chunk.count, chunk.start, chunk.table.tolist()) == (0, 3, 2, [7, 5])
    (group,) = geometry.decodes
    assert group.rows is not None
    assert group.rows.tolist() == [3]


def test_full_and_begun_blocks_leave_nothing_to_clear() -> None:
    assert build_geometry([RowSpan(0, 4, (2,)), RowSpan(5, 1, (0, 1))], 4, 3, CPU).unwritten is None


def test_what_another_request_left_does_not_spread() -> None:
    """A block whose last owner overflowed holds NaN, and NaN times a weight of 0 is NaN."""
    world, spans = decoding([6])
    world.kv.keys[1, 2:] = world.kv.values[1, 2:] = float("nan")
    assert not world.step(spans).isfinite().all(), "cleared by whoever writes a block first, and not again"
    world.step([(0, 0, 5)])
    assert world.step(spans).isfinite().all()


def test_sequences_with_a_shared_prefix_gather_no_more_than_the_cache_holds() -> None:
    lengths = [13, 14, 15, 13, 16]
    tables = [(0, 1, 2, 3 + i) for i in range(5)]
    world = World(4, 2, 1, tables, lengths, blocks=8)
    for i in range(1, 5):
        world.keys[i][:, :12], world.values[i][:, :12] = world.keys[0][:, :12], world.values[0][:, :12]
    world.step([(0, 0, 12)])
    for i, length in enumerate(lengths):
        if length > 13:
            world.step([(i, 12, length - 13)])
    spans = [(i, length - 1, 1) for i, length in enumerate(lengths)]
    torch.testing.assert_close(world.step(spans).double(), world.reference(spans), rtol=1e-4, atol=1e-5)
    gathered = [len(group.tables) for group in geometry_of(world).decodes]
    assert gathered == [8, 8, 4], "two rows of four blocks each at a time, in a cache of eight"


@settings(deadline=None)
@given(
    starts=st.lists(st.integers(0, 31), min_size=1, max_size=40),
    block_size=st.sampled_from((1, 2, 4, 16)),
    more=st.integers(0, 40),
)
def test_every_decode_is_in_one_group_within_the_bound(starts: list[int], block_size: int, more: int) -> None:
    blocks = 32 // block_size + more
    spans = [RowSpan(start, 1, tuple(range(32 // block_size))) for start in starts]
    groups = build_geometry(spans, block_size, blocks, CPU).decodes
    assert all(len(group.tables) == len(group.lengths) * group.width <= blocks for group in groups)
    rows = [row for group in groups for row in (range(len(starts)) if group.rows is None else group.rows.tolist())]
    assert sorted(rows) == list(range(len(starts)))


def unused_kv() -> PagedKv:
    return PagedKv(1, 4, 1, HEAD_DIM, torch.float32, CPU)


def one_row(kv: PagedKv, mask: Tensor | None = None, **options: object) -> None:
    row = torch.zeros(1, 1, 1, HEAD_DIM)
    paged_attention(SimpleNamespace(headroom_kv=kv), row, row, row, mask, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["s_aux", "position_bias", "alibi", "head_mask"])
def test_refuses_what_it_would_leave_out(name: str) -> None:
    with pytest.raises(UnsupportedAttention, match=f"SimpleNamespace passes {name}"):
        one_row(unused_kv(), **{name: torch.zeros(1)})


def test_refuses_a_prebuilt_mask_and_dropout() -> None:
    with pytest.raises(UnsupportedAttention, match="passes a prebuilt mask"):
        one_row(unused_kv(), torch.zeros(1, 1, 1, 1))
    with pytest.raises(UnsupportedAttention, match="passes dropout"):
        one_row(unused_kv(), dropout=0.1)


def test_takes_neutral_extras_and_counts_calls() -> None:
    kv = unused_kv()
    kv.geometry = build_geometry([RowSpan(0, 1, (0,))], 4, kv.scratch, CPU)
    one_row(kv, s_aux=None, is_causal=True)
    assert kv.calls == 1


def test_outside_a_step_is_a_mistake() -> None:
    with pytest.raises(RuntimeError, match="outside a step"):
        one_row(unused_kv())


def test_bytes_count_the_scratch_block() -> None:
    kv = PagedKv(3, 4, 2, HEAD_DIM, torch.float16, CPU)
    assert kv.bytes == 2 * (3 + 1) * 4 * 2 * HEAD_DIM * 2
