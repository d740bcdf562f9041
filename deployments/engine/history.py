"""The ids behind the KV cache: what each block's tokens were, on the device that samples.

Penalties need a row's prompt and output. Kept in blocks like the KV cache, they are there whenever the KV is: after a
prefix hit nobody sends the prompt again, and the last id need not have reached the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class TokenHistory:
    """Token ids by KV block: int32 [num_blocks + 1, block_size], 4 * block_size * (num_blocks + 1) bytes.

    The last block is scratch: what is written there, no request reads.
    """

    def __init__(self, num_blocks: int, block_size: int, device: torch.device) -> None:
        self.ids = torch.zeros(num_blocks + 1, block_size, dtype=torch.int32, device=device)

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self.ids.shape[1]

    @property
    def bytes(self) -> int:
        """Bytes held on the device."""
        return self.ids.nbytes

    def note(self, ids: Tensor, slots: Tensor) -> None:
        """Write `ids` int64 or int32 [T] at `slots` int64 [T], block * block_size + offset. Can be graphed."""
        self.ids.view(-1).index_copy_(0, slots, ids.to(torch.int32))

    def gather(self, tables: Tensor) -> Tensor:
        """The ids of block tables int32 [rows, blocks]: int64 [rows, blocks * block_size].

        Behind a row's last token there is whatever was written there before; it is an id all the same.
        """
        ids = self.ids.index_select(0, tables.reshape(-1))
        return ids.view(len(tables), -1).to(torch.int64)


class BlockTables:
    """Block tables of a batch's rows, padded to one width that only grows; uploaded again when one has changed."""

    def __init__(self, rows: int) -> None:
        self._known: list[tuple[int, ...]] = [()] * rows
        self._padded = torch.zeros(rows, 0, dtype=torch.int32)
        self.on_device = self._padded
        """int32 [rows, width], set by whoever uploads them."""

    def update(self, tables: Sequence[tuple[int, ...]]) -> Tensor | None:
        """Take over the rows' tables of this step.

        Returns:
            int32 [rows, width] on the host to upload, or None when no table has changed.
        """
        changed = [i for i, table in enumerate(tables) if table != self._known[i]]
        if not changed:
            return None
        self._widen(max(map(len, tables)))
        for i in changed:
            self._known[i] = tables[i]
            self._padded[i, : len(tables[i])] = torch.tensor(tables[i], dtype=torch.int32)
        return self._padded

    def _widen(self, width: int) -> None:
        rows, have = self._padded.shape
        if width > have:
            spare = max(width, 2 * have) - have
            self._padded = torch.cat((self._padded, torch.zeros(rows, spare, dtype=torch.int32)), dim=1)
