from __future__ import annotations

import pytest

from deployments.engine.blocks import BlockManager, IntegrityError, OutOfBlocks

IDS = tuple(range(100, 112))  # three blocks of four


def fill(blocks: BlockManager, seq_id: str, ids: tuple[int, ...], salt: str = "") -> int:
    """Opens, grows and commits a sequence, as one whole prefill does; returns the cached tokens."""
    cached = blocks.open(seq_id, ids, salt)
    blocks.grow(seq_id, len(ids))
    blocks.commit(seq_id, ids, len(ids))
    blocks.check_integrity()
    return cached


def counts(blocks: BlockManager) -> tuple[int, int, int]:
    return blocks.free_blocks, blocks.held_blocks, blocks.cached_blocks


def test_a_table_grows_block_by_block() -> None:
    blocks = BlockManager(4, 4)
    assert blocks.open("a", IDS, "") == 0
    for tokens, held in [(0, 0), (1, 1), (4, 1), (5, 2), (12, 3), (3, 3)]:
        blocks.grow("a", tokens)
        assert blocks.held("a") == len(blocks.table("a")) == held
    assert len(set(blocks.table("a"))) == 3
    assert set(blocks.table("a")) <= set(range(4))
    assert counts(blocks) == (1, 3, 0)


def test_growth_beyond_what_is_free_names_both_numbers_and_changes_nothing() -> None:
    blocks = BlockManager(3, 4)
    blocks.open("a", (), "")
    blocks.grow("a", 5)
    before = list(blocks.table("a"))
    assert blocks.can_grow("a", 12)
    assert not blocks.can_grow("a", 13)
    with pytest.raises(OutOfBlocks, match="needs 2 more KV blocks, 1 are free") as caught:
        blocks.grow("a", 13)
    assert (caught.value.need, caught.value.have) == (2, 1)
    assert blocks.table("a") == before
    blocks.check_integrity()


@pytest.mark.parametrize(
    ("ids", "cached"),
    [
        (IDS, 8),  # the last block is left, so that a token is computed
        ((*IDS, 1), 12),
        (IDS[:9], 8),
        (IDS[:8], 4),
        (IDS[:5], 4),
        (IDS[:4], 0),
        (IDS[:1], 0),
        ((), 0),
        ((0, *IDS[1:]), 0),
        ((*IDS[:4], 0, *IDS[5:]), 4),
        (IDS[4:], 0),  # same content elsewhere: its parent differs
    ],
)
def test_a_prompt_matches_the_whole_blocks_of_its_prefix(ids: tuple[int, ...], cached: int) -> None:
    blocks = BlockManager(8, 4)
    fill(blocks, "a", IDS)
    assert blocks.match_prefix(ids, "") == cached
    assert blocks.open("b", ids, "") == cached
    assert list(blocks.table("b")) == list(blocks.table("a"))[: cached // 4]


def test_salts_and_namespaces_are_kept_apart() -> None:
    blocks = BlockManager(8, 4)
    fill(blocks, "a", IDS, salt="tenant")
    assert blocks.match_prefix(IDS, "tenant") == 8
    assert blocks.match_prefix(IDS, "") == blocks.match_prefix(IDS, "tenant2") == 0

    def first_digest(namespace: bytes, salt: str) -> bytes:
        digests: list[bytes] = []
        BlockManager(1, 4, namespace=namespace).open("a", IDS, salt, digests=digests)
        return digests[0]

    assert (
        len({first_digest(b"ab", "c"), first_digest(b"a", "bc"), first_digest(b"abc", ""), first_digest(b"", "")}) == 4
    )


def test_a_shared_block_is_counted_once_and_outlives_its_first_holder() -> None:
    blocks = BlockManager(8, 4)
    fill(blocks, "a", IDS)
    assert fill(blocks, "b", IDS) == 8
    assert counts(blocks) == (4, 4, 0)
    blocks.close("a")
    assert counts(blocks) == (5, 3, 1)  # a's own third block was hashed first: evictable
    blocks.close("b")
    assert counts(blocks) == (8, 0, 3)  # b's third block was a duplicate: free
    blocks.check_integrity()


def test_only_full_committed_blocks_can_be_matched() -> None:
    blocks = BlockManager(8, 4)
    blocks.open("a", IDS, "")
    blocks.grow("a", 12)
    for computed, cached in [(0, 0), (3, 0), (4, 4), (7, 4), (8, 8)]:
        blocks.commit("a", IDS, computed)
        assert blocks.match_prefix((*IDS, 1), "") == cached
    blocks.close("a")
    assert counts(blocks) == (8, 0, 2)


def test_commit_refuses_more_than_ids_or_blocks_cover() -> None:
    blocks = BlockManager(8, 4)
    blocks.open("a", IDS, "")
    blocks.grow("a", 6)
    with pytest.raises(ValueError, match="9 tokens committed, ids and blocks cover 8"):
        blocks.commit("a", IDS, 9)
    with pytest.raises(ValueError, match="6 tokens committed, ids and blocks cover 5"):
        blocks.commit("a", IDS[:5], 6)


def test_the_least_recently_used_prefix_is_evicted_first_and_from_its_tail() -> None:
    blocks = BlockManager(5, 4)
    old, new = (*IDS[:8], 1), (50, 51, 52, 53, 54, 55, 56, 57, 1)
    for seq_id, ids in (("old", old), ("new", new)):
        fill(blocks, seq_id, ids)
        blocks.close(seq_id)
    assert counts(blocks) == (5, 0, 4)
    fill(blocks, "old again", old)  # used: now the youngest
    blocks.close("old again")
    blocks.open("x", (), "")
    matched = []
    for held in range(1, 6):
        blocks.grow("x", 4 * held)
        blocks.check_integrity()
        matched.append((blocks.match_prefix(old, ""), blocks.match_prefix(new, "")))
    assert matched == [(8, 8), (8, 4), (8, 0), (4, 0), (0, 0)]


def test_matching_takes_evictable_blocks_out_of_the_free_count() -> None:
    blocks = BlockManager(3, 4)
    fill(blocks, "a", IDS)
    blocks.close("a")
    assert counts(blocks) == (3, 0, 3)
    assert blocks.open("b", IDS, "") == 8
    assert counts(blocks) == (1, 2, 1)
    assert not blocks.can_grow("b", 17)
    blocks.grow("b", 12)  # evicts its own tail of old
    assert counts(blocks) == (0, 3, 0)
    blocks.check_integrity()


def test_without_prefix_cache_nothing_is_matched_or_kept() -> None:
    blocks = BlockManager(4, 4, prefix_cache=False)
    fill(blocks, "a", IDS)
    assert blocks.match_prefix(IDS, "") == 0
    blocks.close("a")
    assert counts(blocks) == (4, 0, 0)


def test_a_digest_chain_is_computed_once_and_reused() -> None:
    blocks = BlockManager(8, 4)
    digests: list[bytes] = []
    blocks.open("a", IDS, "", digests=digests)
    blocks.grow("a", 12)
    blocks.commit("a", IDS, 12)
    assert len(digests) == 3
    blocks.close("a")
    reopened = list(digests)
    assert blocks.open("a", (*IDS, 1), "", digests=digests) == 12
    assert digests == reopened


def test_a_sequence_has_one_table() -> None:
    blocks = BlockManager(4, 4)
    blocks.open("a", IDS, "")
    with pytest.raises(ValueError, match="already has a block table"):
        blocks.open("a", IDS, "")
    blocks.close("a")
    assert blocks.held("a") == 0
    assert not blocks.open_tables
    for use_closed in (lambda: blocks.close("a"), lambda: blocks.table("a"), lambda: blocks.grow("a", 1)):
        with pytest.raises(KeyError):
            use_closed()


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 4), (4, 0), (-1, 4)])
def test_sizes_below_one_are_refused(num_blocks: int, block_size: int) -> None:
    with pytest.raises(ValueError, match="at least one block of one token"):
        BlockManager(num_blocks, block_size)


def test_check_integrity_finds_each_kind_of_damage() -> None:
    def lost(blocks: BlockManager) -> None:
        blocks._free.pop()

    def freed_while_held(blocks: BlockManager) -> None:
        blocks._free.append(blocks.table("a")[0])

    def held_twice(blocks: BlockManager) -> None:
        blocks._tables["a"].blocks.append(blocks.table("a")[0])

    def uncounted(blocks: BlockManager) -> None:
        blocks._references[blocks.table("a")[0]] = 2

    def unknown_id(blocks: BlockManager) -> None:
        blocks._free.append(99)

    def one_way_hash(blocks: BlockManager) -> None:
        blocks._digest_of.pop(blocks.table("a")[0])

    def matchable_free_block(blocks: BlockManager) -> None:
        blocks._free.append(blocks._evictable.popitem()[0])

    def evictable_without_digest(blocks: BlockManager) -> None:
        blocks._evictable[blocks._free.pop()] = None

    expected = {
        lost: r"block \d+ is in 0 of",
        freed_while_held: r"block \d+ is in 2 of",
        held_twice: "sequence a holds a block twice",
        uncounted: r"block \d+: 2 references, in 1 tables",
        unknown_id: "9 block ids are known of 8",
        one_way_hash: "don't map both ways",
        matchable_free_block: r"free block \d+ can be matched",
        evictable_without_digest: r"evictable block \d+ has no digest",
    }
    for damage, message in expected.items():
        blocks = BlockManager(8, 4)
        fill(blocks, "b", (1, 2, 3, 4))
        blocks.close("b")
        fill(blocks, "a", IDS)
        damage(blocks)
        with pytest.raises(IntegrityError, match=message):
            blocks.check_integrity()
