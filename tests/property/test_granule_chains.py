"""Chains of granule hashes are equal just as far as the prompts are."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from deployments.engine.blocks import BlockManager
from deployments.granules import prefix_of

SIZE = 4
IDS = st.lists(st.sampled_from([0, 1, 2**32 - 1]), max_size=24)
SALTS = st.sampled_from(["", "a", "b"])


def common(one: list[int], two: list[int]) -> int:
    """Length of the common beginning."""
    return next((n for n, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))


@given(one=IDS, cut=st.integers(0, 24), rest=IDS, salt=SALTS, other_salt=SALTS)
def test_equal_just_as_far_as_tokens_and_salts_are(
    one: list[int], cut: int, rest: list[int], salt: str, other_salt: str
) -> None:
    two = one[:cut] + rest
    mine, theirs = prefix_of(one, salt, SIZE).hashes, prefix_of(two, other_salt, SIZE).hashes
    assert len(mine) == max(0, len(one) - 1) // SIZE
    shared = min(common(one, two) // SIZE, len(mine), len(theirs)) if salt == other_salt else 0
    assert mine[:shared] == theirs[:shared]
    assert not set(mine[shared:]) & set(theirs[shared:])
    assert len({*mine, *theirs}) == len(mine) + len(theirs) - shared


@given(prompts=st.lists(st.tuples(IDS, SALTS), min_size=1, max_size=6), block_size=st.sampled_from([1, 2, 4]))
def test_what_the_engine_reports_is_what_the_ingress_looks_for(
    prompts: list[tuple[list[int], str]], block_size: int
) -> None:
    """Whole granules that were computed are reported as used just under the hashes of the prompts that begin so."""
    blocks = BlockManager(200, block_size, granule_tokens=SIZE)
    expected: set[int] = set()
    for number, (ids, salt) in enumerate(prompts):
        blocks.open(str(number), ids, salt)
        blocks.grow(str(number), len(ids))
        blocks.commit(str(number), ids, len(ids))
        expected.update(prefix_of([*ids, 0], salt, SIZE).hashes)
    assert set(blocks.take_granule_news().used) == expected
    for number in range(len(prompts)):
        blocks.close(str(number))
    assert set(blocks.take_granule_news().idle) == expected
