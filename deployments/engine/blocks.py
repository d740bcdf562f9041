"""KV blocks as integers: who holds which, and which hold a known prefix. No tensors here.

Each block id of `0 .. num_blocks - 1` is in exactly one of three places:

    free        holds nothing worth keeping
    evictable   no sequence uses it, but its content is known by hash and may be matched again
    referenced  in the table of one sequence, or of several that share a prefix

A full block is known by a digest of its parent's digest and its own token ids, so equal digests mean equal tokens from
position 0 on, hence equal KV. The first parent is a digest of the namespace (model, KV dtype) and the tenant's salt.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, KeysView, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from struct import Struct

from deployments import granules
from deployments.engine.prefix_index import PrefixIndex
from deployments.errors import HeadroomError
from deployments.protocol import CachedGranules

_DIGEST_BYTES = 32


class OutOfBlocks(HeadroomError):
    """A table can't grow: `need` more blocks are wanted and only `have` are free or evictable."""

    def __init__(self, seq_id: str, need: int, have: int) -> None:
        super().__init__(
            f"sequence {seq_id} needs {need} more KV blocks, {have} are free; "
            "preempt another sequence, or give the KV cache more memory"
        )
        self.need = need
        self.have = have


class IntegrityError(HeadroomError, AssertionError):
    """The accounts of the engine contradict each other: a bug, never a client's fault."""


@dataclass(slots=True)
class _Table:
    blocks: list[int]
    salt: str
    digests: list[bytes]
    """Chain of the sequence's full blocks, as far as it was computed; may run ahead of `settled`."""
    settled: int
    """Leading blocks that need no commit any more: matched, hashed, or left un-hashed as duplicates."""
    matchable: int
    """Leading blocks that are found by their digests themselves, not as duplicates of blocks that are."""
    hashes: list[int] = field(default_factory=list)
    """Chain of the sequence's granules, as far as it was computed."""
    using: list[int] = field(default_factory=list)
    """Blocks that complete the granules among the matchable blocks, while the sequence uses them."""
    retired: bool = False


class BlockManager:
    """Block tables of sequences, with prefixes shared by reference count and evicted least recently used.

    Every operation costs O(1) per block it touches, and each full block of a sequence is hashed once.

    Args:
        num_blocks: blocks of the KV cache.
        block_size: tokens per block.
        namespace: what else makes KV differ (model, KV dtype); part of every digest.
        prefix_cache: False matches nothing and keeps nothing.
        granule_tokens: a multiple of `block_size`: follows which granules of prompts are cached; None doesn't.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        namespace: bytes = b"",
        prefix_cache: bool = True,
        granule_tokens: int | None = None,
    ) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"need at least one block of one token, got num_blocks={num_blocks}, {block_size=}")
        if granule_tokens is not None and (granule_tokens < 1 or granule_tokens % block_size):
            raise ValueError(f"a granule must be whole blocks of {block_size} tokens, got {granule_tokens=}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._namespace = namespace
        self._prefix_cache = prefix_cache
        self._granule_tokens = granule_tokens or block_size
        self._granule_blocks = granule_tokens // block_size if granule_tokens else 0
        self._index = PrefixIndex()
        self._ids_format = Struct(f"<{block_size}q")
        self._references = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._evictable: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._block_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}
        self._tables: dict[str, _Table] = {}

    @property
    def free_blocks(self) -> int:
        """Blocks that a table could take now: free or evictable."""
        return len(self._free) + len(self._evictable)

    @property
    def held_blocks(self) -> int:
        """Blocks in at least one table; a shared block counts once."""
        return self.num_blocks - self.free_blocks

    @property
    def cached_blocks(self) -> int:
        """Blocks in no table whose content may be matched again."""
        return len(self._evictable)

    @property
    def shared_blocks(self) -> int:
        """How much less than the sum of their tables the sequences not retired hold; whole granules count."""
        return self._index.shared * self._granule_blocks

    @property
    def open_tables(self) -> KeysView[str]:
        """Ids of the sequences with an open table."""
        return self._tables.keys()

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that cover `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def table(self, seq_id: str) -> Sequence[int]:
        """Block ids of an open table, in token order. A view: copy it to keep it."""
        return self._tables[seq_id].blocks

    def held(self, seq_id: str) -> int:
        """Blocks in the sequence's table, shared ones included; 0 if none is open."""
        table = self._tables.get(seq_id)
        return 0 if table is None else len(table.blocks)

    def match_prefix(self, ids: Sequence[int], salt: str) -> int:
        """Tokens of the longest cached prefix of `ids`: whole blocks, and never all of `ids`.

        One token at least is left to compute, since logits come from computing, not from the cache.
        """
        return len(self._match(ids, salt, [])) * self.block_size

    def open(self, seq_id: str, ids: Sequence[int], salt: str, *, digests: list[bytes] | None = None) -> int:
        """Start a table on the cached prefix of `ids`, shared with whoever else holds it.

        Args:
            digests: the sequence's digest chain; extended in place. A caller that opens a sequence again later
                (refused admission, preemption) passes the same list each time, and nothing is hashed twice.

        Returns:
            Tokens that the shared blocks hold.

        Raises:
            ValueError: `seq_id` has a table.
        """
        if seq_id in self._tables:
            raise ValueError(f"sequence {seq_id} already has a block table")
        chain = [] if digests is None else digests
        shared = self._match(ids, salt, chain)
        for block in shared:
            if self._references[block] == 0:
                del self._evictable[block]
            self._references[block] += 1
        table = self._tables[seq_id] = _Table(shared, salt, chain, settled=len(shared), matchable=len(shared))
        self._use_granules(table)
        return len(shared) * self.block_size

    def can_grow(self, seq_id: str, num_tokens: int) -> bool:
        """Whether `grow` would succeed now."""
        return self._missing(seq_id, num_tokens) <= self.free_blocks

    def grow(self, seq_id: str, num_tokens: int) -> None:
        """Make the table cover `num_tokens` tokens; it never shrinks.

        Raises:
            OutOfBlocks: too few are free; nothing was changed.
        """
        missing = self._missing(seq_id, num_tokens)
        if missing > self.free_blocks:
            raise OutOfBlocks(seq_id, missing, self.free_blocks)
        self._tables[seq_id].blocks.extend(self._take() for _ in range(missing))

    def commit(self, seq_id: str, ids: Sequence[int], computed: int) -> None:
        """Declare the KV of `ids[:computed]` written: the full blocks among them can be matched from now on.

        A block equal to one that is cached already stays un-hashed, so that a digest names one block.

        Raises:
            ValueError: `computed` is more than `ids` or the table holds.
        """
        table = self._tables[seq_id]
        have = min(len(ids), len(table.blocks) * self.block_size)
        if computed > have:
            raise ValueError(f"sequence {seq_id}: {computed} tokens committed, ids and blocks cover {have}")
        if not self._prefix_cache:
            return
        for index in range(table.settled, computed // self.block_size):
            digest, block = self._digest(table.digests, index, ids, table.salt), table.blocks[index]
            new = digest not in self._block_of
            if new:
                self._block_of[digest] = block
                self._digest_of[block] = digest
            table.settled = index + 1
            self._follow(table, index, ids, new)

    def retire(self, seq_id: str) -> None:
        """The sequence ended, though a step in flight names its blocks: nobody may count on sharing them any more."""
        table = self._tables[seq_id]
        for block in table.using:
            self._index.leave(block)
        table.using, table.retired = [], True

    def take_granule_news(self) -> CachedGranules:
        """Which granules came into the cache, into use, out of use, or were evicted since the last call."""
        return self._index.take_news()

    def close(self, seq_id: str) -> None:
        """Drop the table. Blocks that nobody else holds become evictable if hashed, free if not."""
        self.retire(seq_id)
        # Last block first: a prefix is evicted from its tail, since without its head the tail can't be matched.
        for block in reversed(self._tables.pop(seq_id).blocks):
            self._references[block] -= 1
            if self._references[block] > 0:
                continue
            if block in self._digest_of:
                self._evictable[block] = None
            else:
                self._free.append(block)

    def check_integrity(self) -> None:
        """Compare every account with every other, in O(blocks).

        Raises:
            IntegrityError: names the first block or account that is wrong.
        """
        counts = Counter(block for table in self._tables.values() for block in table.blocks)
        for seq_id, table in self._tables.items():
            _require(len(set(table.blocks)) == len(table.blocks), f"sequence {seq_id} holds a block twice")
        places = Counter([*self._free, *self._evictable, *counts])
        for block in range(self.num_blocks):
            _require(places[block] == 1, f"block {block} is in {places[block]} of free, evictable and referenced")
            found = self._references[block]
            _require(found == counts[block], f"block {block}: {found} references, in {counts[block]} tables")
        _require(len(places) == self.num_blocks, f"{len(places)} block ids are known of {self.num_blocks}")
        self._check_hashes()
        self._check_granules()

    def _check_hashes(self) -> None:
        _require(_inverse(self._block_of.items()) == self._digest_of, "digests and blocks don't map both ways")
        for block in self._free:
            _require(block not in self._digest_of, f"free block {block} can be matched")
        for block in self._evictable:
            _require(block in self._digest_of, f"evictable block {block} has no digest")

    def _check_granules(self) -> None:
        users = self._index.users()
        _require(users.keys() <= self._digest_of.keys(), "a block completes a granule, but can't be matched")
        found = Counter(block for table in self._tables.values() for block in table.using)
        _require(found == Counter({b: n for b, n in users.items() if n}), "users of granules differ from the tables")
        extra = sum(count - 1 for count in found.values())
        _require(extra == self._index.shared, f"{self._index.shared} granules are shared, the tables share {extra}")
        for seq_id, table in self._tables.items():
            leading = table.blocks[: len(table.using) * self._granule_blocks]
            digests = table.digests[: len(leading)]
            _require([self._block_of.get(d) for d in digests] == leading, f"{seq_id} uses what can't be matched")

    def _follow(self, table: _Table, index: int, ids: Sequence[int], new: bool) -> None:
        """Block `index` was committed, and is found by its digest if it is `new`."""
        if new and self._granule_blocks and (index + 1) % self._granule_blocks == 0:
            count = (index + 1) // self._granule_blocks
            granules.extend(table.hashes, ids, table.salt, self._granule_tokens, until=count)
            self._index.add(table.blocks[index], table.hashes[count - 1])
        if new and table.matchable == index:
            table.matchable += 1
            self._use_granules(table)

    def _use_granules(self, table: _Table) -> None:
        """Enter the sequence as a user of all granules among its matchable blocks."""
        if not self._granule_blocks or table.retired:
            return
        for number in range(len(table.using), table.matchable // self._granule_blocks):
            block = table.blocks[(number + 1) * self._granule_blocks - 1]
            self._index.enter(block)
            table.using.append(block)

    def _match(self, ids: Sequence[int], salt: str, digests: list[bytes]) -> list[int]:
        blocks: list[int] = []
        if self._prefix_cache:
            for index in range((len(ids) - 1) // self.block_size):
                block = self._block_of.get(self._digest(digests, index, ids, salt))
                if block is None:
                    break
                blocks.append(block)
        return blocks

    def _digest(self, digests: list[bytes], index: int, ids: Sequence[int], salt: str) -> bytes:
        """`digests[index]`, extending the chain of full blocks of `ids` as far as needed."""
        while len(digests) <= index:
            start = len(digests) * self.block_size
            parent = digests[-1] if digests else self._root(salt)
            content = self._ids_format.pack(*ids[start : start + self.block_size])
            digests.append(blake2b(parent + content, digest_size=_DIGEST_BYTES).digest())
        return digests[index]

    def _root(self, salt: str) -> bytes:
        # The length keeps (namespace "ab", salt "c") apart from ("a", "bc").
        text = len(self._namespace).to_bytes(8, "little") + self._namespace + salt.encode()
        return blake2b(text, digest_size=_DIGEST_BYTES).digest()

    def _missing(self, seq_id: str, num_tokens: int) -> int:
        return max(0, self.blocks_for(num_tokens) - len(self._tables[seq_id].blocks))

    def _take(self) -> int:
        """A block for one table; evicts the least recently used cached one when none is free."""
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._evictable.popitem(last=False)
            del self._block_of[self._digest_of.pop(block)]
            self._index.drop(block)
        self._references[block] = 1
        return block


def _inverse(pairs: Iterable[tuple[bytes, int]]) -> dict[int, bytes]:
    return {block: digest for digest, block in pairs}


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise IntegrityError(otherwise)
