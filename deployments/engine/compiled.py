"""Decoder layers through torch.compile: norms, rotary embeddings, activations and residuals fuse into a few kernels.

Each layer's forward is compiled by itself, whole, with the number of rows left open; layers of one kind share the code.
What a layer calls for its linears and its attention are custom operators, and stay as they are.

Where GPUs can (capability 9.0), a kernel starts while the one before ends: programmatic dependent launch. One rule
makes it safe, which the kernels of `kernels/` keep too: a kernel waits for the one before, and only then lets the next
one start. So whatever runs finds all kernels done but the one before it, and that one, too, once it has waited.
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


def compile_layers(layers: list[nn.Module], attempt: Callable[[], None], *, called: str = "the layers") -> str | None:
    """Let `layers` run compiled from here on.

    Args:
        layers: of one device.
        attempt: runs them, with one row and with several, so that code exists before the first request.
        called: what they are, for the log.

    Returns:
        None, or in a line why they run as they were.
    """
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    _overlap_kernels()
    for layer in layers:
        layer.forward = torch.compile(layer.forward, fullgraph=True, dynamic=True)  # of this instance alone
    try:
        attempt()
    except Exception as error:  # noqa: BLE001  whatever a compiler raises, the layers run without it
        for layer in layers:
            del layer.__dict__["forward"]
        reason = f"{type(error).__name__}: {_first_line(error)}"
        log.warning("%s run without torch.compile: %s", called, reason)
        return reason
    return None


def _overlap_kernels() -> None:
    """Let Inductor's kernels start while the kernel before ends; it asks whether the device can."""
    from torch._inductor.codegen.triton import TritonKernel  # takes seconds, and only GPUs come here

    if not hasattr(TritonKernel, "_filter_pdl"):
        log.info("kernels do not overlap: torch %s writes its code in another way", torch.__version__)
        return
    torch._inductor.config.triton.enable_pdl = True
    torch.compiler.config.cache_key_tag = "headroom waits first"  # of code on disk: not Inductor's own placement
    TritonKernel._filter_pdl = _wait_first  # type: ignore[method-assign, assignment]


def _wait_first(kernel: Any, body: Any) -> None:
    """The body of one of Inductor's kernels, in its last form: first it waits, then it lets the next kernel start.

    Inductor itself waits before the first load that the kernel before might have written, and never in a kernel that
    loads nothing: what comes after such a kernel would run beside what comes before it. It also lets the next kernel
    start behind its last load, when the next one could long have begun to read its weights.
    """
    if not kernel._enable_pdl_codegen():
        return
    calls = (kernel.GDC_WAIT, kernel.GDC_LAUNCH)
    kept = [line for line in body._lines if not (isinstance(line, str) and line.strip() in calls)]
    body._lines = [*calls, *kept]


def _first_line(error: Any) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")[:300]
