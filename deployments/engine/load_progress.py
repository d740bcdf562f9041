"""How much of the planned weights is on the GPUs, logged while they load."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from threading import Event

import torch

from deployments.engine.background import beside
from placement.hardware import format_bytes
from placement.plan import Plan

log = logging.getLogger(__name__)

EVERY_S = 3.0


def logging_progress(plan: Plan) -> AbstractContextManager[None]:
    """Log it every `EVERY_S` seconds of the block, and once when it ends. For a plan on GPUs."""
    gpus = {stage.device for stage in plan.stages}
    planned, before = sum(stage.weight_bytes for stage in plan.stages), _allocated(gpus)
    return beside(lambda ended: log_progress(planned, lambda: _allocated(gpus) - before, ended))


def log_progress(planned: int, held: Callable[[], int], ended: Event) -> None:
    """Log how much of `planned` bytes is there, until `ended` is set and then once more.

    Args:
        held: bytes that are on the GPUs by now.
    """
    while not ended.wait(EVERY_S):
        _log(held(), planned)
    _log(held(), planned)


def _log(held: int, planned: int) -> None:
    there = min(max(held, 0), planned)  # a tensor that is quantised right now is there twice, and the head comes last
    log.info("loading weights: %s of %s (%d %%)", format_bytes(there), format_bytes(planned), 100 * there // planned)


def _allocated(gpus: Iterable[int]) -> int:
    return sum(torch.cuda.memory_allocated(gpu) for gpu in gpus)
