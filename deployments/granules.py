"""Prompts in granules: a chain of hashes that ingress and engine compute alike, so that the ledger can compare them.

    hash 0     = blake2b-64(root, ids of granule 0)
    hash i     = blake2b-64(hash i-1, ids of granule i)
    root       = blake2b-64(granule size, tenant's salt)

So two hashes are equal just when all tokens up to there, the salts and the granule sizes are: two tenants never match,
and neither do a service's old and new granule size while it is updated. Hashes of 64 bits are for routing alone. A
collision costs a grant that is too small, which its replica's report puts right; the blocks themselves are matched by
256 bits (`engine.blocks`). Only whole granules count, and never the prompt's last token, which is always computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from struct import pack

from deployments.protocol import Prefix

LEAST_TOKENS = 64
"""Shorter common beginnings are cheaper to compute again than to look for."""


def granule_tokens(block_sizes: Iterable[int]) -> int:
    """The granule for pools of these block sizes, in tokens: the smallest multiple of all that has `LEAST_TOKENS`."""
    common = math.lcm(*block_sizes)
    return common * -(-LEAST_TOKENS // common)


def prefix_of(prompt_ids: Sequence[int], salt: str, tokens: int) -> Prefix:
    """The prefix by which a prompt is looked for.

    Args:
        prompt_ids: token ids, 0 to 2^32 - 1.
        salt: the tenant's.
        tokens: of one granule.
    """
    hashes: list[int] = []
    extend(hashes, prompt_ids, salt, tokens, until=(len(prompt_ids) - 1) // tokens)
    return Prefix(tokens, tuple(hashes))


def extend(hashes: list[int], ids: Sequence[int], salt: str, tokens: int, *, until: int) -> None:
    """Make a chain `until` granules long, in place; `ids` begins with the prompt's first token."""
    parent = hashes[-1].to_bytes(8, "little") if hashes else _root(salt, tokens)
    for start in range(len(hashes) * tokens, until * tokens, tokens):
        parent = blake2b(parent + pack(f"<{tokens}I", *ids[start : start + tokens]), digest_size=8).digest()
        hashes.append(int.from_bytes(parent, "little"))


def _root(salt: str, tokens: int) -> bytes:
    return blake2b(tokens.to_bytes(8, "little") + salt.encode(), digest_size=8, person=b"granule").digest()
