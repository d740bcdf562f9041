"""Why a model doesn't fit, device by device, and which single change would make it fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from placement.errors import DoesNotFit
from placement.footprint import Footprint
from placement.reserve import Workload
from placement.solver import Problem

_MORE_DEVICES = 8
_NARROWER = (("int8", False), ("nf4", False), ("nf4", True))
_ROUND = 10**6


def shortfall(problem: Problem) -> DoesNotFit:
    """The error for a problem without a solution. Its knobs were each tried."""
    extra = _least_extra(problem)
    roomier = _with_more(problem, extra)
    cuts = roomier.pack(1, roomier.ever)
    assert cuts is not None, "_least_extra is enough"
    need = [0] * len(problem.devices)
    for cut in cuts:
        need[cut.device] = roomier.need(cut, 1)
    knobs = (
        f"give each device {extra // _ROUND:,} MB more (max_memory, or devices with more memory)",
        *_knobs(problem),
    )
    return DoesNotFit(problem.footprint.model, tuple(need), problem.budgets, knobs)


def _least_extra(problem: Problem) -> int:
    """The least equal addition to every budget, in whole megabytes, with which one KV block fits."""
    low, high = 0, 1
    while not _fits(_with_more(problem, high * _ROUND)):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _fits(_with_more(problem, middle * _ROUND)) else (middle, high)
    return high * _ROUND


def _knobs(problem: Problem) -> Iterator[str]:
    """Changes of one setting that fit, the mildest of each kind."""
    footprint, workload = problem.footprint, problem.workload
    for quantization, double in _NARROWER:
        narrower = footprint.at(quantization, double_quant=double)
        if narrower.bytes < footprint.bytes and _fits(_with(problem, footprint=narrower)):
            yield f"quantization: {quantization}" + (" with double_quant: true" if double else "")
            break
    for more in range(1, _MORE_DEVICES + 1):
        if _fits(_with_devices(problem, more)):
            yield f"{more} more {'device' if more == 1 else 'devices'} like the last (stages, or --gpus)"
            break
    for name in ("max_batch_tokens", "max_sequences", "max_context"):
        value = getattr(workload, name) // 2
        while value and not _fits(_with(problem, workload=replace(workload, **{name: value}))):
            value //= 2
        if value:
            yield f"{name}: {value} instead of {getattr(workload, name)}"


def _with_devices(problem: Problem, more: int) -> Problem:
    devices = problem.devices + problem.devices[-1:] * more
    budgets = problem.budgets + problem.budgets[-1:] * more
    return Problem.of(problem.footprint, devices, budgets, problem.workload)


def _with_more(problem: Problem, extra: int) -> Problem:
    budgets = tuple(budget + extra for budget in problem.budgets)
    return Problem.of(problem.footprint, problem.devices, budgets, problem.workload)


def _with(problem: Problem, *, footprint: Footprint | None = None, workload: Workload | None = None) -> Problem:
    return Problem.of(footprint or problem.footprint, problem.devices, problem.budgets, workload or problem.workload)


def _fits(problem: Problem) -> bool:
    return problem.pack(1, problem.ever) is not None
