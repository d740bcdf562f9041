"""The head and a greedy draw as CUDA graphs, for steps that decode and ask for each row's likeliest token alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from deployments.engine.capture import Graph
from deployments.engine.sampling import likeliest

_VIEWS = 1024
"""Of what was found, by the number of rows, that are kept."""


class GreedyDraws:
    """A graph for each number of rows that the head takes, from hidden states to ids.

    Steps of all slots run the same graphs, one after the other: what they draw is copied out of the graphs' buffer.

    Args:
        head: logits [rows, vocab] of hidden states [1, rows, hidden].
        hidden: [1, most rows or more, hidden]; the graphs read its first rows.
        sizes: numbers of rows.
        capture: makes a graph of what a function queues.
    """

    def __init__(
        self,
        head: Callable[[Tensor], Tensor],
        hidden: Tensor,
        sizes: Sequence[int],
        capture: Callable[[Callable[[], object]], Graph],
    ) -> None:
        self._head = head
        self._hidden = hidden
        self._found = torch.zeros(2, max(sizes), dtype=torch.int64, device=hidden.device)
        """The rows' ids, always of the vocabulary; and the same with -1 for a row that is bad."""
        self._first = lru_cache(_VIEWS)(lambda count: self._found[:, :count])
        # The largest first: in its memory the logits of the others have room.
        self._graphs = {rows: self._captured(rows, capture) for rows in sorted(sizes, reverse=True)}

    def reads(self, hidden: Tensor) -> bool:
        """Whether these hidden states [1, T, hidden] are the ones that the graphs read."""
        return hidden.data_ptr() == self._hidden.data_ptr()

    def draw(self, rows: int, count: int) -> Tensor:
        """Queue the graph of so many rows: int64 [2, count], of its first ones; later draws leave it as it is.

        Returns:
            The ids, always of the vocabulary; and the same with -1 for a row that is bad.
        """
        self._graphs[rows].replay()
        return self._first(count).clone()

    def _captured(self, rows: int, capture: Callable[[Callable[[], object]], Graph]) -> Graph:
        hidden, found = self._hidden[:, :rows], self._found[:, :rows]

        def queue() -> None:
            ids, good = likeliest(self._head(hidden))
            found[0].copy_(ids)
            found[1].copy_(torch.where(good, ids, -1))

        return capture(queue)
