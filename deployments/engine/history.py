"""The ids behind the KV cache: what each block's tokens were, on the device that samples.

Penalties need a row's prompt and output. Kept in blocks like the KV cache, they are there whenever the KV is: after a
prefix hit nobody sends the prompt again, and the last id need not have reached the host.
"""

from __future__ import annotations

import torch
from torch import Tensor


class TokenHistory:
    """Token ids by KV block: int32 [num_blocks + 1, block_size], 4 * block_size * (num_blocks + 1) bytes.

    The last block is scratch: what is written there is never read.
    """

    def __init__(self, num_blocks: int, block_size: int, device: torch.device) -> None:
        self.ids = torch.zeros(num_blocks + 1, block_size, dtype=torch.int32, device=device)

    @property
    def bytes(self) -> int:
        """Bytes held on the device."""
        return self.ids.nbytes

    def note(self, ids: Tensor, slots: Tensor) -> None:
        """Write `ids` int64 or int32 [T] at `slots` int64 [T], block * block_size + offset. Can be graphed."""
        self.ids.view(-1).index_copy_(0, slots, ids.to(torch.int32))
