"""Decoder layers through torch.compile: norms, rotary embeddings, activations and residuals fuse into a few kernels.

Each layer's forward is compiled by itself, whole, with the number of rows left open; layers of one kind share the code.
What a layer calls for its linears and its attention are custom operators, and stay as they are.

A layer is compiled twice: for few rows, and for many. Inductor chooses how large the blocks of a kernel are by its
first call, so each is first called with a usual number. And where GPUs can (capability 9.0), the kernels of few rows
start while the one before ends: programmatic dependent launch. One rule makes it safe, which the kernels of `kernels/`
keep too: a kernel waits for the one before, and only then lets the next one start. So whatever runs finds all kernels
done but the one before it, and that one, too, once it has waited.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

RECOMPILE_LIMIT = 64
"""Kinds of layers times devices times {one row, few, many}; beyond it torch would fall back without a word."""

FEW_ROWS = 64
"""Steps of more have no kernels that overlap: blocks that wait take the place of blocks that work. Measured on an H200
with an 8B shape in NF4: a step of 64 rows took 0.95 of the time, one of 128 1.01, one of 256 1.04, one of 2,048 1.1."""

MOST_IN_REGISTERS = 16384
"""Numbers of a row that a norm holds at once."""


def compile_layers(layers: list[nn.Module], attempt: Callable[[], None], *, called: str = "the layers") -> str | None:
    """Let `layers` run compiled from here on.

    Args:
        layers: of one device.
        attempt: runs them, with one row, few and many, so that code exists before the first request.
        called: what they are, for the log.

    Returns:
        None, or in a line why they run as they were.
    """
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    few = _overlapping()
    for layer in layers:
        layer.forward = _by_rows(layer.forward, few)  # of this instance alone
    try:
        with _whole_rows():
            attempt()
    except Exception as error:  # noqa: BLE001  whatever a compiler raises, the layers run without it
        for layer in layers:
            del layer.__dict__["forward"]
        reason = f"{type(error).__name__}: {_first_line(error)}"
        log.warning("%s run without torch.compile: %s", called, reason)
        return reason
    return None


def _by_rows(forward: Callable[..., Any], few_options: dict[str, Any]) -> Callable[..., Any]:
    """A forward of hidden states [..., rows, hidden], its first argument, compiled for few of them and for many."""
    few = torch.compile(forward, fullgraph=True, dynamic=True, options=few_options)
    many = torch.compile(forward, fullgraph=True, dynamic=True)

    def run(*args: Any, **kwargs: Any) -> Any:
        hidden: Tensor = args[0] if args else next(iter(kwargs.values()))
        return (few if hidden.shape[-2] <= FEW_ROWS else many)(*args, **kwargs)

    return run


def _overlapping() -> dict[str, Any]:
    """Inductor's options for kernels that start while the kernel before ends; it asks whether the device can."""
    from torch._inductor.codegen.triton import TritonKernel  # takes seconds, and only GPUs come here

    torch.compiler.config.cache_key_tag = "headroom: waits first, rows whole"  # of code on disk: not as Inductor has it
    if not hasattr(TritonKernel, "_filter_pdl"):
        log.info("kernels do not overlap: torch %s writes its code in another way", torch.__version__)
        return {}
    TritonKernel._filter_pdl = _wait_first  # type: ignore[method-assign, assignment]  # its docstring says why
    return {"triton.enable_pdl": True}


def _whole_rows() -> AbstractContextManager[Any]:
    """While code is made in it, a norm holds a row in registers. Inductor itself reads rows of more than 1,024 numbers
    twice, in a loop: of one row, which is one block of threads, nothing hides the wait for memory."""
    from torch._inductor.choices import InductorChoices
    from torch._inductor.runtime.hints import ReductionHint
    from torch._inductor.virtualized import V

    class WholeRows(InductorChoices):
        @staticmethod
        def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
            numbers, along_rows = features.reduction_numel, features.get_reduction_hint() == ReductionHint.INNER
            if along_rows and not cooperative_reduction and numbers.is_number and numbers <= MOST_IN_REGISTERS:
                return True
            return InductorChoices.should_use_persistent_reduction(features, cooperative_reduction)

    handler: AbstractContextManager[Any] = V.set_choices_handler(WholeRows())
    return handler


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
