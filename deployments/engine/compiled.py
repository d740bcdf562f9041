"""Decoder layers through torch.compile: norms, rotary embeddings, activations and residuals fuse into a few kernels.

Each layer's forward is compiled by itself, whole, with the number of rows left open; layers of one kind share the code.
What a layer calls for its linears and its attention are custom operators, and stay as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

log = logging.getLogger(__name__)

RECOMPILE_LIMIT = 64
"""Kinds of layers times devices times {one row, several rows}; beyond it torch would fall back without a word."""


def compile_layers(layers: list[nn.Module], attempt: Callable[[], None]) -> str | None:
    """Let `layers` run compiled from here on.

    Args:
        layers: of one device.
        attempt: runs them, with one row and with several, so that code exists before the first request.

    Returns:
        None, or in a line why they run as they were.
    """
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    for layer in layers:
        layer.forward = torch.compile(layer.forward, fullgraph=True, dynamic=True)  # of this instance alone
    try:
        attempt()
    except Exception as error:  # noqa: BLE001  whatever a compiler raises, the layers run without it
        for layer in layers:
            del layer.__dict__["forward"]
        reason = f"{type(error).__name__}: {_first_line(error)}"
        log.warning("the layers run without torch.compile: %s", reason)
        return reason
    return None


def _first_line(error: Any) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")[:300]
