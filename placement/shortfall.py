"""Why a model doesn't fit, device by device, and which single change would make it fit, by how much."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from placement.errors import DoesNotFit, PlacementError
from placement.kv import kv_dtype_bytes
from placement.problem import Problem
from placement.question import Question
from placement.solver import fits, last, pack, without_needless_resort
from placement.workload import Workload

_MORE_DEVICES = 8
_NARROWER = (("int8", False), ("nf4", False), ("nf4", True))
_ROUND = 10**6
_FP8 = "float8_e4m3fn"


def shortfall(problem: Problem) -> DoesNotFit:
    """The error for a problem without a solution. Each of its knobs was tried: with it alone the model fits."""
    question = problem.question
    extra = _least_extra(lambda more: _with_more(question, more))
    roomier = without_needless_resort(Problem.of(_with_more(question, extra)))
    cuts = pack(roomier, question.least_blocks, roomier.ever)
    assert cuts is not None, "_least_extra is enough"
    need = [0] * len(question.devices)
    for cut in cuts:
        need[cut.device] = roomier.need(cut, question.least_blocks)
    knobs = (
        *_caps(question),
        *_scaled_caps(problem),
        f"give each device {extra // _ROUND:,} MB more (max_memory, or devices with more memory)",
        *_narrower(question),
        *_devices(question),
        *_smaller(question),
    )
    return DoesNotFit(question.footprint.model, tuple(need), question.budgets, knobs)


def _least_extra(changed: Callable[[int], Question]) -> int:
    """The least addition in whole megabytes with which the changed question has an answer; enough must be enough."""
    high = _ROUND
    while not _fits(changed(high)):
        high *= 2
    return high - _ROUND * last(lambda less: _fits(changed(high - less * _ROUND)), 0, high // (2 * _ROUND))


def _with_more(question: Question, extra: int) -> Question:
    return replace(question, budgets=tuple(budget + extra for budget in question.budgets))


def _caps(question: Question) -> Iterator[str]:
    """One cap raised within what its device has: the least such raise."""
    raises = []
    for device, (gpu, budget) in enumerate(zip(question.devices, question.budgets, strict=True)):
        room = (gpu.usable_bytes - budget) // _ROUND

        def raised(more: int, device: int = device) -> Question:
            budgets = list(question.budgets)
            budgets[device] += more
            return replace(question, budgets=tuple(budgets))

        if room and _fits(raised(room * _ROUND)):
            raises.append((room - last(lambda n: _fits(raised((room - n) * _ROUND)), 0, room), device))  # noqa: B023  called at once
    if raises:
        more, device = min(raises)
        yield f"max_memory: {more:,} MB more for device {device}"


def _scaled_caps(problem: Problem) -> Iterator[str]:
    """All caps raised in one ratio, to a thousandth and whole megabytes: the least that fit."""
    question, context = problem.question, [reserve.context for reserve in problem.reserves]
    usable = [gpu.usable_bytes for gpu in question.devices]
    caps = {i: budget - context[i] for i, budget in enumerate(question.budgets) if context[i] < budget < usable[i]}
    if len(caps) < 2:
        return

    def scaled(thousandths: int) -> dict[int, int]:
        return {i: -(-cap * thousandths // (1000 * _ROUND)) for i, cap in caps.items()}

    def raised(thousandths: int) -> Question:
        budgets = {i: megabytes * _ROUND + context[i] for i, megabytes in scaled(thousandths).items()}
        return replace(question, budgets=tuple(budgets.get(i, budget) for i, budget in enumerate(question.budgets)))

    most = min((usable[i] - context[i] - _ROUND) * 1000 // cap for i, cap in caps.items())
    if most > 1000 and _fits(raised(most)):
        least = most - last(lambda less: _fits(raised(most - less)), 0, most - 1000)
        yield f"max_memory: {','.join(f'{i}={size}MB' for i, size in scaled(least).items())}, in the same ratio"


def _narrower(question: Question) -> Iterator[str]:
    """Fewer bits for the weights, the mildest that fits; then for the KV cache."""
    for quantization, double in _NARROWER:
        try:
            narrower = question.footprint.at(quantization, double_quant=double)
        except PlacementError:
            break  # a checkpoint that is quantised already keeps its bits
        if narrower.bytes < question.footprint.bytes and _fits(replace(question, footprint=narrower)):
            yield f"quantization: {quantization}" + (" with double_quant: true" if double else "")
            break
    workload = question.workload
    narrow = replace(question, workload=replace(workload, kv_dtype=_FP8))
    if kv_dtype_bytes(workload.kv_dtype) > 1 and _fits(narrow):
        yield f"kv_dtype: fp8 instead of {workload.kv_dtype}"


def _devices(question: Question) -> Iterator[str]:
    """The fewest more devices of the largest kind."""
    count = len(question.devices) - question.last_resort
    largest = max(range(count), key=lambda device: question.budgets[device])

    def added(more: int) -> Question:
        # The last resort, which pins count from the end, stays last.
        order = (*range(count), *(largest,) * more, *range(count, len(question.devices)))
        return replace(
            question,
            devices=tuple(question.devices[i] for i in order),
            budgets=tuple(question.budgets[i] for i in order),
        )

    for more in range(1, _MORE_DEVICES + 1):
        if _fits(added(more)):
            plural = "device" if more == 1 else "devices"
            yield f"{more} more {plural} like device {largest} (stages, or --gpus)"
            return


def _smaller(question: Question) -> Iterator[str]:
    """Smaller wishes, each the largest that fits: tokens of a step, sequences at once, context, concurrency."""
    workload, demand = question.workload, question.demand

    def at(smaller: Workload) -> Question:
        return replace(question, workload=smaller)

    wishes: list[tuple[str, int, int, Callable[[int], Question]]] = [
        ("max_batch_tokens", workload.max_batch_tokens, 1, lambda n: at(replace(workload, max_batch_tokens=n))),
        ("max_sequences", workload.max_sequences, demand.requests, lambda n: at(replace(workload, max_sequences=n))),
        ("min_context", demand.context, 1, lambda n: replace(question, demand=demand.within(n))),
        ("max_context", workload.max_context, 1, lambda n: _shortened(question, n)),
        ("min_concurrency", demand.requests, 1, lambda n: replace(question, demand=replace(demand, requests=n))),
    ]
    for name, value, least, changed in wishes:
        if value > least and _fits(changed(least)):
            most = last(lambda n: _fits(changed(n)), least, value)  # noqa: B023  called at once
            yield f"{name}: {most} instead of {value}"


def _shortened(question: Question, context: int) -> Question:
    """With no sequence longer than `context`, neither allowed nor demanded."""
    workload = replace(question.workload, max_context=context)
    return replace(question, workload=workload, demand=question.demand.within(context))


def _fits(question: Question) -> bool:
    return fits(Problem.of(question))
