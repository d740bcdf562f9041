"""Which granules of prompts the block manager says to have, and who it says uses them. Blocks of 2, granules of 4."""

from __future__ import annotations

import pytest

from deployments.engine.blocks import BlockManager
from deployments.granules import prefix_of
from deployments.protocol import CachedGranules

IDS = tuple(range(100, 112))
FIRST, SECOND, THIRD = prefix_of((*IDS, 0), "", 4).hashes
NOTHING = CachedGranules()


def manager(num_blocks: int = 20, **options: bool) -> BlockManager:
    return BlockManager(num_blocks, 2, granule_tokens=4, **options)


def fill(blocks: BlockManager, seq_id: str, ids: tuple[int, ...], salt: str = "") -> None:
    blocks.open(seq_id, ids, salt)
    blocks.grow(seq_id, len(ids))
    blocks.commit(seq_id, ids, len(ids))
    blocks.check_integrity()


def close(blocks: BlockManager, seq_id: str) -> None:
    blocks.close(seq_id)
    blocks.check_integrity()


def test_a_granule_is_used_then_idle_then_gone() -> None:
    blocks = manager(6)
    fill(blocks, "a", IDS[:9])
    assert blocks.take_granule_news() == CachedGranules(used=(FIRST, SECOND))
    assert blocks.take_granule_news() == NOTHING
    close(blocks, "a")
    assert blocks.take_granule_news() == CachedGranules(idle=(FIRST, SECOND))
    fill(blocks, "b", tuple(range(7)))  # 4 blocks: 2 were free, and 2 are evicted from the tail of what is cached
    (gone,) = blocks.take_granule_news().gone
    assert gone == SECOND
    assert blocks.match_prefix(IDS, "") == 4


def test_a_granule_is_told_when_its_last_block_is_written() -> None:
    blocks = manager()
    blocks.open("a", IDS, "")
    blocks.grow("a", len(IDS))
    told = []
    for computed in range(13):
        blocks.commit("a", IDS, computed)
        told.append(blocks.take_granule_news().used)
    assert told == [(), (), (), (), (FIRST,), (), (), (), (SECOND,), (), (), (), (THIRD,)]


def test_what_is_shared_is_counted_once() -> None:
    blocks = manager()
    fill(blocks, "a", IDS)
    assert blocks.shared_blocks == 0
    for count, seq_id in enumerate(("b", "c"), 1):
        blocks.open(seq_id, IDS[:9], "")
        assert blocks.shared_blocks == 4 * count
    assert blocks.shared_blocks == sum(map(blocks.held, "abc")) - blocks.held_blocks
    close(blocks, "a")
    assert blocks.shared_blocks == 4
    close(blocks, "b")
    close(blocks, "c")
    assert blocks.shared_blocks == 0


def test_nobody_may_count_on_what_a_retired_sequence_holds() -> None:
    blocks = manager()
    fill(blocks, "a", IDS[:9])
    fill(blocks, "b", IDS[:9])
    assert blocks.shared_blocks == 4
    blocks.retire("a")
    assert (blocks.shared_blocks, blocks.held("a")) == (0, 5)
    assert blocks.take_granule_news() == CachedGranules(used=(FIRST, SECOND))
    blocks.retire("b")
    blocks.commit("b", IDS[:9], 9)  # the step in flight lands
    blocks.check_integrity()
    assert blocks.take_granule_news() == CachedGranules(idle=(FIRST, SECOND))
    close(blocks, "a")
    close(blocks, "b")
    assert blocks.take_granule_news() == NOTHING


def test_behind_a_duplicate_nothing_is_used() -> None:
    """b computes the first granule again and holds no block that can be found; what it adds is cached, not used."""
    blocks = manager()
    for seq_id in "ab":
        blocks.open(seq_id, IDS, "")
        blocks.grow(seq_id, len(IDS))
    blocks.commit("a", IDS, 4)
    blocks.commit("b", IDS, 8)
    blocks.check_integrity()
    assert blocks.take_granule_news() == CachedGranules(used=(FIRST,), idle=(SECOND,))
    close(blocks, "a")
    assert blocks.take_granule_news() == CachedGranules(idle=(FIRST,))


def test_a_failed_admission_is_no_news() -> None:
    blocks = manager()
    fill(blocks, "a", IDS)
    close(blocks, "a")
    blocks.take_granule_news()
    blocks.open("b", IDS, "")
    blocks.close("b")
    assert blocks.take_granule_news() == NOTHING


def test_salts_are_kept_apart() -> None:
    blocks = manager()
    fill(blocks, "a", IDS[:5], "one")
    fill(blocks, "b", IDS[:5], "two")
    used = blocks.take_granule_news().used
    assert used == (*prefix_of(IDS[:5], "one", 4).hashes, *prefix_of(IDS[:5], "two", 4).hashes)
    assert len(set(used)) == 2
    assert blocks.shared_blocks == 0


def test_without_a_prefix_cache_or_granules_there_is_no_news() -> None:
    for blocks in (manager(prefix_cache=False), BlockManager(20, 2)):
        fill(blocks, "a", IDS)
        fill(blocks, "b", IDS)
        assert (blocks.take_granule_news(), blocks.shared_blocks) == (NOTHING, 0)


def test_a_granule_is_whole_blocks() -> None:
    with pytest.raises(ValueError, match="whole blocks of 3 tokens, got granule_tokens=64"):
        BlockManager(20, 3, granule_tokens=64)
