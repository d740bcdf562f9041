"""A layer's tensors in one allocation: nothing overlaps, nothing is lost."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from placement.arena import ALIGNMENT, layout, taken

SIZES = st.lists(st.integers(1, 2**40), max_size=40)


@given(SIZES)
def test_tensors_lie_aligned_one_behind_the_other(sizes: list[int]) -> None:
    offsets, total = layout(sizes)
    assert len(offsets) == len(sizes)
    assert not any(offset % ALIGNMENT for offset in (*offsets, total))
    gaps = [end - start - size for (start, end), size in zip(pairwise((*offsets, total)), sizes, strict=True)]
    assert all(0 <= gap < ALIGNMENT for gap in gaps)
    assert (offsets or (total,))[0] == 0


@given(SIZES, st.randoms())
def test_the_whole_does_not_depend_on_the_order(sizes: list[int], random: object) -> None:
    shuffled = sizes.copy()
    random.shuffle(shuffled)  # type: ignore[attr-defined]  # Hypothesis' random.Random
    assert layout(shuffled)[1] == layout(sizes)[1]


@given(st.integers(0, 2**40))
def test_no_arena_takes_less_than_it_holds(size: int) -> None:
    assert size <= taken(size) <= max(2 * size, size + 2**21)


@given(st.integers(0, 2**25), st.integers(0, 2**25))
def test_a_larger_arena_takes_no_less(size: int, more: int) -> None:
    assert taken(size) <= taken(size + more)
