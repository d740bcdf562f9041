"""What was measured, as a table, a plot, JSON, and the goals it meets or misses."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.client import Answer, rate
from benchmarks.cpu_meter import Part
from benchmarks.overhead import GOAL_RATE, GOAL_STEP, Overhead

GOAL_MANY = 4.0
"""Times sequential `generate()`'s tokens/s at MANY clients."""
GOAL_ONE = 0.9
"""Times the same at one client."""
GOAL_ADDED_S = 0.015
"""Seconds that HTTP, router and ledger may add to the first token at p50."""
MANY = 16
STEADY = 1.5
"""Factor by which the baseline's runs may differ; beyond it the machine was busy with something else."""
PERCENTILES = (50, 90, 99)


def percentile(values: Iterable[float], percent: float) -> float:
    """Linear between the two nearest ranks; NaN for no values."""
    ordered = sorted(values)
    if not ordered:
        return math.nan
    rank = (len(ordered) - 1) * percent / 100
    low = math.floor(rank)
    high = math.ceil(rank)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


@dataclass(frozen=True, slots=True)
class Level:
    """All rounds at one number of concurrent clients."""

    clients: int
    rounds: tuple[tuple[Answer, ...], ...]

    @property
    def rates(self) -> list[float]:
        """Output tokens/s of each round."""
        return [rate(answers) for answers in self.rounds]

    def pooled(self, of: Callable[[Answer], list[float]]) -> list[float]:
        """A quantity's values over the answers of all rounds."""
        return [value for answers in self.rounds for answer in answers for value in of(answer)]

    def summary(self) -> dict[str, Any]:
        """Percentiles in seconds, and tokens/s of each round."""
        quantities: dict[str, Callable[[Answer], list[float]]] = {
            "ttft_s": lambda a: [a.ttft],
            "inter_token_s": lambda a: a.gaps,
            "end_to_end_s": lambda a: [a.end_to_end],
        }
        percentiles = {
            name: {f"p{p}": percentile(self.pooled(of), p) for p in PERCENTILES} for name, of in quantities.items()
        }
        return {"clients": self.clients, "tokens_per_s": self.rates, **percentiles}


@dataclass(frozen=True, slots=True)
class Baseline:
    """Sequential `generate()`: tokens/s of each run."""

    sweep: dict[str, float]
    """Tokens/s by thread count."""
    alone: tuple[float, ...]
    """With no server on the machine."""
    beside: tuple[float, ...]
    """While the server was up and idle."""
    seconds: tuple[float, ...]
    """End to end, of every answer in all runs."""
    same_text: tuple[int, int]
    """Answers whose text equals the served one, of how many compared."""

    @property
    def tokens_per_s(self) -> float:
        """The better of the two medians."""
        return max(statistics.median(runs) for runs in (self.alone, self.beside) if runs)

    @property
    def spread(self) -> float:
        """The fastest over the slowest run, the sweep's best among them."""
        runs = (max(self.sweep.values()), *self.alone, *self.beside)
        return max(runs) / min(runs)


@dataclass(frozen=True, slots=True)
class Goal:
    """One goal of the benchmark and what was reached."""

    name: str
    reached: float
    wanted: float
    at_least: bool
    unit: str

    @property
    def met(self) -> bool:
        """False for NaN too."""
        return self.reached >= self.wanted if self.at_least else self.reached <= self.wanted

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        verdict = "met" if self.met else "MISSED"
        return f"{self.name}: {self.reached:.2f}{self.unit} (goal {sign} {self.wanted:g}{self.unit}): {verdict}"


@dataclass(frozen=True, slots=True)
class Report:
    """One run of the benchmark."""

    setup: dict[str, Any]
    levels: tuple[Level, ...]
    baseline: Baseline | None
    engine_first_token_s: tuple[float, ...]
    """Of the bare engine, one request at a time; empty when it was not measured."""
    added_s: tuple[float, ...]
    """Client's less the bare engine's time to the first token, prompt by prompt, in the order of the field above."""
    overhead: Overhead | None = None
    """Against the engine alone at the most clients; None when it was not measured."""
    cpu: tuple[Part, ...] = ()
    """Of clients and service, at the most clients; empty when they were not measured."""

    def level(self, clients: int) -> Level | None:
        """The level of that many clients, if it was run."""
        return next((level for level in self.levels if level.clients == clients), None)

    def goals(self) -> list[Goal]:
        """Those that this run measured."""
        goals: list[Goal] = []
        for clients, wanted in ((MANY, GOAL_MANY), (1, GOAL_ONE)):
            if self.baseline and (level := self.level(clients)):
                ratio = statistics.median(level.rates) / self.baseline.tokens_per_s
                goals.append(Goal(f"tokens/s at {clients} over sequential generate()", ratio, wanted, True, "x"))
        if self.added_s:
            name = "added to the first token at p50 by HTTP, router and ledger"
            goals.append(Goal(name, 1e3 * percentile(self.added_s, 50), 1e3 * GOAL_ADDED_S, False, " ms"))
        return goals + self._overhead_goals()

    def _overhead_goals(self) -> list[Goal]:
        if (found := self.overhead) is None:
            return []
        return [
            Goal(f"tokens/s at {found.clients} over the engine alone", found.rate_ratio, GOAL_RATE, True, "x"),
            Goal(f"a step of {found.clients} over the engine alone", found.step_ratio, GOAL_STEP, False, "x"),
        ]

    def meets_all_goals(self) -> bool:
        """Whether all of what was compared with were measured on a steady machine, and met."""
        goals = self.goals()
        expected = 3 * (self.baseline is not None) + 2 * (self.overhead is not None)
        return self.steady and 0 < expected == len(goals) and all(goal.met for goal in goals)

    @property
    def steady(self) -> bool:
        """Whether the baseline's runs agree."""
        return self.baseline is None or self.baseline.spread <= STEADY

    def as_json(self) -> dict[str, Any]:
        """Everything but the answers' texts."""
        return {
            "setup": self.setup,
            "levels": [level.summary() for level in self.levels],
            "baseline": None
            if self.baseline is None
            else {**asdict(self.baseline), "rate": self.baseline.tokens_per_s},
            "steady": self.steady,
            "engine_first_token_s": list(self.engine_first_token_s),
            "added_s": list(self.added_s),
            "overhead": None if self.overhead is None else asdict(self.overhead),
            "cpu": [asdict(part) for part in self.cpu],
            "goals": [{**asdict(goal), "met": goal.met} for goal in self.goals()],
        }

    def table(self) -> str:
        """Plain text, one row per level; times in milliseconds, tokens/s the median of the rounds."""
        heads = ["clients", "tokens/s", *(f"{q} p{p}" for q in ("ttft", "token", "total") for p in PERCENTILES)]
        rows = [_cells(level.summary()) for level in self.levels]
        if self.baseline:
            totals = [_milliseconds(percentile(self.baseline.seconds, p)) for p in PERCENTILES]
            rows.append(["generate()", f"{self.baseline.tokens_per_s:.1f}", *[""] * 2 * len(PERCENTILES), *totals])
        return _aligned([heads, *rows])

    def cpu_table(self) -> str:
        """Plain text, one row per part; CPU time in milliseconds per request."""
        clients = max(level.clients for level in self.levels)
        heads = [f"CPU at {clients} clients", "processes", "ms/request", "busiest, cores"]
        rows = [
            [part.role, str(part.processes), f"{1e3 * part.per_request_s:.1f}", f"{part.busiest:.2f}"]
            for part in self.cpu
        ]
        return _aligned([heads, *rows])

    def __str__(self) -> str:
        setup = ", ".join(f"{name}: {value}" for name, value in self.setup.items())
        parts = [setup, "", self.table(), ""]
        if self.cpu:
            parts += [self.cpu_table(), ""]
        if self.baseline:
            sweep = ", ".join(f"{threads}: {rate:.1f}" for threads, rate in self.baseline.sweep.items())
            same, compared = self.baseline.same_text
            parts.append(f"generate(): tokens/s by threads {sweep}; {same} of {compared} answers have the served text")
        if self.engine_first_token_s:
            parts.append(f"bare engine: first token p50 {1e3 * percentile(self.engine_first_token_s, 50):.0f} ms")
        if self.overhead:
            parts.append(str(self.overhead))
        parts += map(str, self.goals())
        if self.baseline and not self.steady:
            parts.append(
                f"UNSTEADY: the baseline's runs differ by a factor of {self.baseline.spread:.1f} (over {STEADY}), so "
                "the machine was busy with something else and the ratios mean nothing; stop that, and run again"
            )
        return "\n".join(parts)


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(" ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in lines)


def _cells(summary: dict[str, Any]) -> list[str]:
    times = [summary[q][f"p{p}"] for q in ("ttft_s", "inter_token_s", "end_to_end_s") for p in PERCENTILES]
    rates = statistics.median(summary["tokens_per_s"])
    return [str(summary["clients"]), f"{rates:.1f}", *map(_milliseconds, times)]


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.0f}"


def plot(report: Report, path: Path) -> None:
    """Three panels over the number of clients: tokens/s, time to the first token, time between tokens."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (rates, *delays) = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    clients = [level.clients for level in report.levels]
    summaries = [level.summary() for level in report.levels]
    rates.plot(clients, [statistics.median(s["tokens_per_s"]) for s in summaries], marker="o", label="Headroom")
    if report.baseline:
        rates.axhline(report.baseline.tokens_per_s, color="gray", linestyle="--", label="sequential generate()")
    rates.set(title="Output tokens per second", ylim=(0, None))
    titles = {"ttft_s": "Time to the first token, ms", "inter_token_s": "Time between tokens, ms"}
    for panel, (quantity, title) in zip(delays, titles.items(), strict=True):
        for p in PERCENTILES:
            panel.plot(clients, [1e3 * s[quantity][f"p{p}"] for s in summaries], marker="o", label=f"p{p}")
        panel.set(title=title, yscale="log")
    for panel in (rates, *delays):
        panel.set_xscale("log", base=2)
        panel.set_xticks(clients, [str(count) for count in clients])
        panel.set_xlabel("concurrent clients")
        panel.grid(alpha=0.3)
        panel.legend()
    figure.savefig(path)
    pyplot.close(figure)
