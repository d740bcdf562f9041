"""One request's chunks on their way to whoever reads them: joined while they come faster than is worth passing on.

What a chunk costs on its way (a message between Ray's actors, an event of the HTTP stream, a write) does not depend on
how many tokens it holds. 64 requests at 150 steps/s would be 9,600 chunks/s, and Serve passes on some 2,400.
"""

from __future__ import annotations

import asyncio

from deployments.protocol import TokenChunk

CHUNKS_PER_S = 2000
"""Of all streams of a replica together. Ten streams get each of 200 tokens/s by itself, 64 a chunk each 32 ms."""


def interval_s(streams: int) -> float:
    """Least time between two chunks of one stream."""
    return streams / CHUNKS_PER_S


class Outbox:
    """Chunks in order. A request's first and its last are never held back; times are those of one monotonic clock."""

    def __init__(self) -> None:
        self.due = 0.0
        """When the next chunk may go."""
        self._held: TokenChunk | None = None
        self._ready: asyncio.Queue[TokenChunk] = asyncio.Queue()

    def put(self, chunk: TokenChunk, now: float, interval: float) -> bool:
        """Take a chunk; whether nothing is held back now."""
        self._held = chunk if self._held is None else self._held.joined(chunk)
        return self.release(now, interval)

    def release(self, now: float, interval: float) -> bool:
        """Let go what is held back, if it is due; whether nothing is held back now."""
        if self._held is None:
            return True
        if self._held.finish_reason is None and now < self.due:
            return False
        self._ready.put_nowait(self._held)
        self._held, self.due = None, now + interval
        return True

    async def get(self) -> TokenChunk:
        """All that is ready as one chunk, as soon as there is any: a reader that fell behind gets less often."""
        chunk = await self._ready.get()
        while chunk.finish_reason is None and not self._ready.empty():
            chunk = chunk.joined(self._ready.get_nowait())
        return chunk
