"""The block manager against a model that knows what every block's KV was written from."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from deployments.engine.blocks import BlockManager, OutOfBlocks

Prefix = tuple[str, tuple[int, ...]]


class BlockMachine(RuleBasedStateMachine):
    """Model: `content` is what was last written to a block, `findable` every prefix that was ever committed."""

    @initialize(num_blocks=st.integers(1, 10), block_size=st.integers(1, 3))
    def start(self, num_blocks: int, block_size: int) -> None:
        self.blocks = BlockManager(num_blocks, block_size)
        self.size = block_size
        self.content: dict[int, Prefix] = {}
        self.findable: set[Prefix] = set()
        self.sequences: dict[str, tuple[str, tuple[int, ...]]] = {}
        self.opened = 0

    def longest(self, salt: str, ids: tuple[int, ...]) -> int:
        """Tokens of the longest committed prefix in whole blocks, short of all of `ids`."""
        tokens = 0
        while tokens + self.size < len(ids) and (salt, ids[: tokens + self.size]) in self.findable:
            tokens += self.size
        return tokens

    def pick(self, index: int) -> str:
        names = sorted(self.sequences)
        return names[index % len(names)]

    @rule(ids=st.lists(st.integers(0, 1), max_size=12), salt=st.sampled_from(["", "tenant"]))
    def open(self, ids: list[int], salt: str) -> None:
        seq_id, known = f"s{self.opened}", tuple(ids)
        self.opened += 1
        matched = self.blocks.match_prefix(known, salt)
        free = self.blocks.free_blocks
        assert self.blocks.open(seq_id, known, salt) == matched
        assert matched % self.size == 0
        assert matched <= max(0, len(known) - 1)
        assert self.blocks.held(seq_id) * self.size == matched
        assert free - matched // self.size <= self.blocks.free_blocks <= free
        for index, block in enumerate(self.blocks.table(seq_id)):
            assert self.content[block] == (salt, known[: (index + 1) * self.size])
        self.sequences[seq_id] = (salt, known)

    @rule(ids=st.lists(st.integers(0, 1), min_size=1, max_size=12), salt=st.sampled_from(["", "tenant"]))
    def prefill(self, ids: list[int], salt: str) -> None:
        """The common path at once, so that the cache has something to find."""
        self.open(ids, salt)
        newest = sorted(self.sequences).index(f"s{self.opened - 1}")
        self.grow(newest, len(ids))
        self.write(newest, 1.0)

    @precondition(lambda self: self.sequences)
    @rule(index=st.integers(0, 9), num_tokens=st.integers(0, 40))
    def grow(self, index: int, num_tokens: int) -> None:
        seq_id = self.pick(index)
        before, free = list(self.blocks.table(seq_id)), self.blocks.free_blocks
        need = max(0, -(-num_tokens // self.size) - len(before))
        assert self.blocks.can_grow(seq_id, num_tokens) == (need <= free)
        if need > free:
            with pytest.raises(OutOfBlocks) as caught:
                self.blocks.grow(seq_id, num_tokens)
            assert (caught.value.need, caught.value.have) == (need, free)
            assert (self.blocks.table(seq_id), self.blocks.free_blocks) == (before, free)
            return
        self.blocks.grow(seq_id, num_tokens)
        after = self.blocks.table(seq_id)
        assert after[: len(before)] == before
        assert len(after) == len(before) + need
        assert self.blocks.free_blocks == free - need
        held_by_others = {b for other in self.sequences if other != seq_id for b in self.blocks.table(other)}
        assert not held_by_others & set(after[len(before) :])
        for block in after[len(before) :]:
            self.content.pop(block, None)

    @precondition(lambda self: self.sequences)
    @rule(index=st.integers(0, 9), share=st.floats(0, 1))
    def write(self, index: int, share: float) -> None:
        """Computes some of the sequence's tokens, and commits them."""
        seq_id = self.pick(index)
        salt, ids = self.sequences[seq_id]
        table = self.blocks.table(seq_id)
        computed = int(share * min(len(ids), len(table) * self.size))
        for position in range(computed // self.size):
            prefix = (salt, ids[: (position + 1) * self.size])
            assert self.content.setdefault(table[position], prefix) == prefix
            self.findable.add(prefix)
        self.blocks.commit(seq_id, ids, computed)
        # Held blocks are never evicted: all that was committed is found at once.
        assert self.blocks.match_prefix((*ids[:computed], 9), salt) == computed // self.size * self.size

    @precondition(lambda self: self.sequences)
    @rule(index=st.integers(0, 9))
    def close(self, index: int) -> None:
        seq_id = self.pick(index)
        self.blocks.close(seq_id)
        del self.sequences[seq_id]

    @precondition(lambda self: self.sequences)
    @rule(index=st.integers(0, 9), extra=st.lists(st.integers(0, 1), max_size=4))
    def look_up(self, index: int, extra: list[int]) -> None:
        """Looking changes nothing, and never finds what was not committed."""
        salt, ids = self.sequences[self.pick(index)]
        wanted = (*ids, *extra)
        found = self.blocks.match_prefix(wanted, salt)
        assert found == self.blocks.match_prefix(wanted, salt) <= self.longest(salt, wanted)

    @invariant()
    def accounts_agree(self) -> None:
        if not hasattr(self, "blocks"):
            return
        self.blocks.check_integrity()
        held = {block for seq_id in self.sequences for block in self.blocks.table(seq_id)}
        assert self.blocks.open_tables == set(self.sequences)
        assert self.blocks.held_blocks == len(held)
        assert self.blocks.held_blocks + self.blocks.free_blocks == self.blocks.num_blocks
        assert self.blocks.cached_blocks <= self.blocks.free_blocks

    def teardown(self) -> None:
        for seq_id in list(getattr(self, "sequences", {})):
            self.blocks.close(seq_id)
            self.blocks.check_integrity()
        if hasattr(self, "blocks"):
            assert self.blocks.held_blocks == 0


TestBlockMachine = BlockMachine.TestCase
TestBlockMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
