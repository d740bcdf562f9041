"""The torch backend's geometry, and its attention over any steps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.engine.attention import RowSpan
from deployments.engine.attention_torch import Geometry, TorchAttention, build_geometry
from tests.contract.attention_cases import Bounds, Case, World, cases, decodes, prefills

CPU = torch.device("cpu")


def make(bounds: Bounds) -> TorchAttention:
    return TorchAttention(bounds.num_blocks, bounds.device)


@settings(deadline=None, max_examples=80)
@given(cases())
def test_equals_plain_attention(case: Case) -> None:
    case.check(make, CPU, torch.float32)


def decoded(*lengths: int, block_size: int = 4) -> tuple[World, Geometry]:
    """A step that decodes the last token of sequences whose past is written, checked; and its geometry."""
    case = Case(lengths, (prefills(lengths, 1), decodes(lengths)), block_size=block_size, head_dim=8)
    if max(lengths) == 1:
        case = Case(lengths, (decodes(lengths),), block_size=block_size, head_dim=8)
    world = case.check(make, CPU, torch.float32)
    assert isinstance(world.backend, TorchAttention)
    assert world.backend.geometry is not None
    return world, world.backend.geometry


def test_decodes_of_like_length_share_a_group() -> None:
    _, geometry = decoded(9, 12, 40, 37, 2)
    groups = {tuple(group.rows.tolist()): group.width for group in geometry.decodes if group.rows is not None}
    assert groups == {(0, 1): 3, (2, 3): 10, (4,): 1}


def test_a_step_of_one_group_needs_no_row_index() -> None:
    world, geometry = decoded(9, 12)
    (group,) = geometry.decodes
    assert group.rows is None
    assert group.tables.tolist() == [*world.tables[0], *world.tables[1]]
    assert group.lengths.tolist() == [9, 12]


def test_a_prompt_of_one_token_is_a_decode_over_itself() -> None:
    assert decoded(1)[1].chunks == ()


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


def test_a_block_is_cleared_by_whoever_writes_it_first() -> None:
    """A block whose last owner overflowed holds NaN, and NaN times a weight of 0 is NaN."""
    world, _ = decoded(6)
    second = world.tables[0][1]
    for blocks in (world.kv[0].keys, world.kv[0].values):
        blocks[second, 2:] = float("nan")
    assert not world.step([(0, 5, 1)])[0].isfinite().all(), "and not again"
    world.step([(0, 0, 5)])
    assert world.step([(0, 5, 1)])[0].isfinite().all()


def test_sequences_with_a_shared_prefix_gather_no_more_than_the_cache_holds() -> None:
    lengths = (13, 14, 15, 13, 16)
    spans = [RowSpan(length - 1, 1, (0, 1, 2, 3 + i)) for i, length in enumerate(lengths)]
    gathered = [len(group.tables) for group in build_geometry(spans, 4, 8, CPU).decodes]
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


def test_unprepared_is_a_mistake() -> None:
    world = Case((1,), ([(0, 0, 1)],)).world(make, CPU, torch.float32)
    with pytest.raises(RuntimeError, match="before its step was prepared"), world.backend.step():
        world.attend(0, world.inputs(0, [(0, 0, 1)]))
