"""A study as text, as JSON and as curves."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.report import Goal
from benchmarks.routing.outcome import Interval, Outcome
from benchmarks.routing.study import OURS, Study

GOAL_LOAD = 0.9
GOAL_P99 = {"unequal": 0.5, "equal": 0.8}
"""Our p99 of the time to the first token over the best other policy's, at GOAL_LOAD, by fleet."""
GOAL_SUSTAINED = 1.15
MS = 1e3

Column = tuple[str, Callable[[Outcome], float], str]
COLUMNS: tuple[Column, ...] = (
    ("TTFT mean", lambda o: MS * o.ttft.mean, ".0f"),
    ("p50", lambda o: MS * o.ttft.p50, ".0f"),
    ("p99", lambda o: MS * o.ttft.p99, ".0f"),
    ("token mean", lambda o: MS * o.gap.mean, ".1f"),
    ("p50", lambda o: MS * o.gap.p50, ".1f"),
    ("p99", lambda o: MS * o.gap.p99, ".1f"),
    ("total mean", lambda o: MS * o.end_to_end.mean, ".0f"),
    ("p50", lambda o: MS * o.end_to_end.p50, ".0f"),
    ("p99", lambda o: MS * o.end_to_end.p99, ".0f"),
    ("preempted %", lambda o: 100 * o.preemptions / o.requests, ".2f"),
    ("refused %", lambda o: 100 * o.refused / o.requests, ".2f"),
    ("used %", lambda o: 100 * o.utilisation, ".1f"),
    ("cached %", lambda o: 100 * o.cached, ".0f"),
)


def text(study: Study) -> str:
    """Medians over the seeds at each load, with the interval of the p99; then the sustained loads and the goals."""
    parts = []
    for load in study.loads:
        rows = [["", *(name for name, _, _ in COLUMNS), "interval of TTFT p99"]]
        rows += [_row(study, policy, load) for policy in study.policies]
        parts += [f"load {load:g} of saturation; times in ms", _aligned(rows)]
        if study.others:
            gain = _span(study.gain(load), ".2f")
            parts.append(f"TTFT p99 of the ledger over that of {study.best_other(load)}: {gain}")
        parts.append("")
    if study.sustained:
        parts.append(f"load sustained with a p99 TTFT of at most {study.limit:g} s, as a share of saturation")
        parts += [f"  {policy:16} {_span(Interval.of(study.sustained[policy]), '.2f')}" for policy in study.policies]
        if study.others:
            best, ratio = study.sustained_gain()
            parts.append(f"  the ledger's over that of {best}: {_span(ratio, '.2f')}")
        parts.append("")
    return "\n".join([*parts, *map(str, goals(study))])


def goals(study: Study) -> list[Goal]:
    """Those that the study measured."""
    found: list[Goal] = []
    if not study.others:
        return found
    wanted = GOAL_P99.get(study.setting.fleet)
    if wanted is not None and study.setting.workload != "chats" and GOAL_LOAD in study.loads:
        other = study.best_other(GOAL_LOAD)
        found.append(Goal(f"TTFT p99 at {GOAL_LOAD} over {other}'s", study.gain(GOAL_LOAD).median, wanted, False, "x"))
    if study.sustained:
        best, gain = study.sustained_gain()
        found.append(Goal(f"sustained load over {best}'s", gain.median, GOAL_SUSTAINED, True, "x"))
    return found


def as_json(study: Study) -> dict[str, Any]:
    """Every outcome of every seed."""
    return {
        "setting": {**asdict(study.setting), "trace": study.setting.trace and study.setting.trace.name},
        "outcomes": [
            {"policy": policy, "load": load, "seeds": [asdict(outcome) for outcome in outcomes]}
            for (policy, load), outcomes in study.outcomes.items()
        ],
        "ttft_limit_s": study.limit,
        "sustained": study.sustained,
        "goals": [{**asdict(goal), "met": goal.met} for goal in goals(study)],
    }


def plot(study: Study, path: Path) -> None:
    """Four panels over the load: TTFT p50 and p99, refusals, utilisation."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    panels: tuple[tuple[str, Callable[[Outcome], float], bool], ...] = (
        ("Time to the first token, p50, s", lambda o: o.ttft.p50, True),
        ("Time to the first token, p99, s", lambda o: o.ttft.p99, True),
        ("Preemptions per 100 requests", lambda o: 100 * o.preemptions / o.requests, False),
        ("KV blocks in use, %", lambda o: 100 * o.utilisation, False),
    )
    figure, axes = pyplot.subplots(1, len(panels), figsize=(17, 4), layout="constrained")
    for axis, (title, of, logarithmic) in zip(axes, panels, strict=True):
        for policy in study.policies:
            _curve(axis, study, policy, of)
        axis.set(title=title, xlabel="load, share of saturation")
        if logarithmic and axis.get_legend_handles_labels()[0]:
            axis.set_yscale("log")
        axis.grid(alpha=0.3)
    axes[-1].legend()
    figure.suptitle(f"{study.setting.fleet} fleet, {study.setting.workload}; bands: interval of the median over seeds")
    figure.savefig(path)
    pyplot.close(figure)


def _curve(axis: Any, study: Study, policy: str, of: Callable[[Outcome], float]) -> None:
    """The median, as far as it is finite."""
    spans = [Interval.of([of(outcome) for outcome in study.outcomes[policy, load]]) for load in study.loads]
    finite = [(load, span) for load, span in zip(study.loads, spans, strict=True) if math.isfinite(span.high)]
    if not finite:
        return
    loads = [load for load, _ in finite]
    style = {"linewidth": 2.5, "color": "black"} if policy == OURS else {}
    (line,) = axis.plot(loads, [span.median for _, span in finite], marker="o", label=policy, **style)
    lows, highs = [span.low for _, span in finite], [span.high for _, span in finite]
    axis.fill_between(loads, lows, highs, color=line.get_color(), alpha=0.12)


def _row(study: Study, policy: str, load: float) -> list[str]:
    outcomes = study.outcomes[policy, load]
    cells = [format(Interval.of([of(outcome) for outcome in outcomes]).median, form) for _, of, form in COLUMNS]
    p99 = study.p99(policy, load)
    return [policy, *cells, f"{MS * p99.low:.0f} to {MS * p99.high:.0f}"]


def _span(interval: Interval, form: str) -> str:
    return f"{interval.median:{form}} ({interval.low:{form}} to {interval.high:{form}})"


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(" ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
