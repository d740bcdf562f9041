"""What requests hold, told as what changed since it was told last: of a thousand few change in a step."""

from __future__ import annotations

from collections.abc import Iterable


class Holdings:
    """Blocks by request id, as they were told last."""

    def __init__(self) -> None:
        self._told: dict[str, int] = {}

    def news(self, held: Iterable[tuple[str, int]]) -> tuple[tuple[tuple[str, int], ...], tuple[str, ...]]:
        """Take in what all requests hold now.

        Args:
            held: (request id, blocks) of every request not ended.

        Returns:
            Those of them that are new or hold another number of blocks, and the ids of those that are not among them
            any more.
        """
        before, now = self._told, dict(held)
        self._told = now
        changed = [(request_id, blocks) for request_id, blocks in now.items() if before.get(request_id) != blocks]
        gone = [request_id for request_id in before if request_id not in now]
        return tuple(changed), tuple(gone)
