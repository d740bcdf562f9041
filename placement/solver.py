"""The exact split of a model's layers over devices.

One question is asked again and again: can the layers be split so that no stage takes longer than `time` and each has
room for `blocks` KV blocks? Giving every device, in order, as many layers as it can take answers it exactly: a run of
layers never costs less than a part of it, so a longer prefix behind is never worse. For any order of the devices the
longest prefix is kept for each set of devices already passed, for the same reason. The least time and the most blocks
are then found by bisection, in whole numbers.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from typing import Literal, NamedTuple

from placement.problem import Cut, Problem, Step

Goal = Literal["throughput", "capacity", "latency"]

_SLACK_PERCENT = 5
"""How much slower than the best possible the slowest stage may be, under goal="throughput", for more KV blocks."""

Cuts = tuple[Cut, ...]


class Split(NamedTuple):
    """Stages in pipeline order, and the KV blocks that each has room for."""

    cuts: Cuts
    blocks: int


class _Quickest(NamedTuple):
    key: int
    """Time through all stages and their number, the time first."""
    cuts: Cuts


def best(problem: Problem, goal: Goal) -> Split | None:
    """The best split by `goal` among those that hold what is demanded; None when there is none."""
    problem = without_needless_resort(problem)
    least = problem.question.least_blocks
    if (cuts := pack(problem, least, problem.ever)) is None:
        return None
    if goal == "latency":
        return _best_latency(problem)
    time = problem.ever
    if goal == "throughput":
        quickest, cuts = _least_time(problem, least)
        time = quickest * (100 + _SLACK_PERCENT) // 100
    blocks = last(lambda n: pack(problem, n, time) is not None, _room(problem, cuts), _most_blocks(problem))
    return Split(_least_time(problem, blocks)[1], blocks)


def fits(problem: Problem) -> bool:
    """Whether any split holds what is demanded."""
    problem = without_needless_resort(problem)
    return pack(problem, problem.question.least_blocks, problem.ever) is not None


def without_needless_resort(problem: Problem) -> Problem:
    """`problem` without its last resort where the other devices suffice, else with the fewest layers for it."""
    if not problem.question.last_resort:
        return problem
    least, alone = problem.question.least_blocks, problem.alone()
    if alone is not None and pack(alone, least, alone.ever) is not None:
        return alone
    *reached, _ = _reach(problem, least, problem.ever)[0]  # by the sets without the last resort, which comes last
    return problem.confined(max(reached))


def pack(problem: Problem, blocks: int, time: int) -> Cuts | None:
    """Stages that each hold `blocks` blocks and take at most `time`, or None when there is no such split."""
    reached, taken = _reach(problem, blocks, time)
    if max(reached) < problem.layers:
        return None
    passed, cuts = reached.index(problem.layers), []
    while (step := taken[passed]) is not None:
        if reached[passed] > reached[step.before]:
            cuts.append(Cut(step.device, reached[step.before], reached[passed]))
        passed = step.before
    return tuple(reversed(cuts))


def last(true: Callable[[int], bool], low: int, high: int) -> int:
    """The last number in [low, high] for which a predicate holds that is true at `low` and never turns true again."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if true(middle) else (low, middle - 1)
    return low


def _reach(problem: Problem, blocks: int, time: int) -> tuple[list[int], list[Step | None]]:
    """For each set of devices passed, the most layers they hold, and the step that led there; up to the last layer."""
    reached = [0] + [-1] * (problem.sets - 1)
    taken: list[Step | None] = [None] * problem.sets
    for step in problem.steps:
        end = _farthest(problem, step.device, reached[step.before], blocks, time)
        if end > reached[step.after]:
            reached[step.after], taken[step.after] = end, step
            if end == problem.layers:
                break
    return reached, taken


def _farthest(problem: Problem, device: int, start: int, blocks: int, time: int) -> int:
    """The farthest end of a stage from `start`; `start` itself when not one layer can be taken."""
    work, budget = problem.work, problem.question.budgets[device]
    quick = bisect_right(work, work[start] + time // problem.slowness[device], start) - 1
    end = min(quick, problem.fences[device][start])
    if end == start or problem.need(Cut(device, start, end), blocks) <= budget:
        return end
    return last(lambda e: e == start or problem.need(Cut(device, start, e), blocks) <= budget, start, end - 1)


def _least_time(problem: Problem, blocks: int) -> tuple[int, Cuts]:
    """The least time of the slowest stage with room for `blocks`, and a split that takes it; one must exist."""
    cuts = pack(problem, blocks, problem.ever)
    assert cuts is not None, "asked only where a split exists"
    high, low = _slowest(problem, cuts), _ideal_time(problem) - 1
    while high - low > 1:
        middle = (low + high) // 2
        quicker = pack(problem, blocks, middle)
        if quicker is None:
            low = middle
        else:
            high, cuts = _slowest(problem, quicker), quicker
    return high, cuts


def _most_blocks(problem: Problem) -> int:
    """The most blocks that are of use, or that all devices together would have room for if there were nothing else."""
    useful, each = problem.question.workload.most_blocks, problem.kv[-1]
    return min(useful, sum(problem.question.budgets) // each) if each else useful


def _slowest(problem: Problem, cuts: Cuts) -> int:
    return max(map(problem.time, cuts))


def _ideal_time(problem: Problem) -> int:
    """What the slowest stage takes at least: the work spread over all devices without a remainder."""
    unit = max(problem.slowness)
    return problem.work[-1] * unit // sum(-(-unit // slow) for slow in problem.slowness)


def _best_latency(problem: Problem) -> Split:
    """Time through all stages is a sum, so here the least sum is kept for every prefix of the layers.

    Few splits take the least time, so the most blocks are looked for from those of the first one upwards.
    """
    found = _quickest(problem, problem.question.least_blocks)
    assert found is not None, "asked only where a split exists"
    best_key, cuts, low, step = found.key, found.cuts, _room(problem, found.cuts), 1
    high = problem.question.workload.most_blocks
    while low < high:
        tried = min(low + step, high)
        found = _quickest(problem, tried)
        if found is not None and found.key == best_key:
            cuts, low, step = found.cuts, _room(problem, found.cuts), 2 * step
        else:
            high = tried - 1
            step = max(1, (high - low) // 2)
    return Split(cuts, low)


def _room(problem: Problem, cuts: Cuts) -> int:
    """The blocks that every stage of a split has room for."""
    budgets, question = problem.question.budgets, problem.question
    return last(
        lambda n: all(problem.need(cut, n) <= budgets[cut.device] for cut in cuts),
        question.least_blocks,
        question.workload.most_blocks,
    )


def _quickest(problem: Problem, blocks: int) -> _Quickest | None:
    """The split that takes the least time, then has the fewest stages, with room for `blocks` everywhere."""
    layers, stage = problem.layers, len(problem.question.devices) + 1
    never = (problem.ever + 1) * stage
    keys = [[never] * (layers + 1) for _ in range(problem.sets)]
    starts = [[-1] * (layers + 1) for _ in range(problem.sets)]
    taken: list[list[Step | None]] = [[None] * (layers + 1) for _ in range(problem.sets)]
    keys[0][0] = 0
    for step in problem.steps:
        before, after = keys[step.before], keys[step.after]
        for end, (key, start) in enumerate(_extend(problem, step.device, blocks, before, stage, never)):
            if key < after[end]:
                after[end], starts[step.after][end], taken[step.after][end] = key, start, step
    passed = problem.sets - 1
    if (key := keys[passed][layers]) == never:
        return None
    end, cuts = layers, []
    while (way := taken[passed][end]) is not None:
        start = starts[passed][end]
        if start < end:
            cuts.append(Cut(way.device, start, end))
        passed, end = way.before, start
    return _Quickest(key, tuple(reversed(cuts)))


def _extend(
    problem: Problem, device: int, blocks: int, keys: list[int], stage: int, never: int
) -> list[tuple[int, int]]:
    """Per end, the least key of a prefix that `device` completes, and the start of its stage; it may take nothing.

    A start from which the device does not reach an end reaches no later one either. So the candidates are a queue that
    gets worse from front to back: the front is the best as long as it reaches.
    """
    work, fence, budget = problem.work, problem.fences[device], problem.question.budgets[device]
    slow, queue = problem.slowness[device] * stage, deque[tuple[int, int]]()

    def reaches(start: int, end: int) -> bool:
        return fence[start] >= end and problem.need(Cut(device, start, end), blocks) <= budget

    found = [(keys[0], 0)]
    for end in range(1, problem.layers + 1):
        if keys[end - 1] < never:
            value = keys[end - 1] - work[end - 1] * slow
            while queue and queue[-1][0] >= value:
                queue.pop()
            queue.append((value, end - 1))
        while queue and not reaches(queue[0][1], end):
            queue.popleft()
        option = queue[0][0] + work[end] * slow + 1 if queue else never
        found.append((option, queue[0][1]) if option < keys[end] else (keys[end], end))
    return found
