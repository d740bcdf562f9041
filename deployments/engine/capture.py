"""How a CUDA graph is captured: after runs that load what it needs, in memory that graphs share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

_WARM_UPS = 2
"""Runs before a capture: libraries choose algorithms and take their workspaces at the first ones."""


class Graph(Protocol):
    """What runs once more what was captured."""

    def replay(self) -> None:
        """Queue it on the current stream."""


def capture(queue: Callable[[], object], *, pool: Any, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    """A graph of what `queue` queues on the current stream of the current device.

    Args:
        queue: leaves what is read later in memory that was there before; of its own, nothing.
        pool: memory of graphs of which one runs at a time; those that take most come first, so that others fit in it.
        stream: to capture on, and to run on before that.
    """
    compute = torch.cuda.current_stream(stream.device)
    stream.wait_stream(compute)
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UPS):
            queue()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        queue()
    compute.wait_stream(stream)
    graph.replay()  # the first one uploads it; no request waits for that
    return graph
