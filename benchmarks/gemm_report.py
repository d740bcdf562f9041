"""Times of products, from the files of `benchmarks.gemm --json`: tables, what was aimed at, and a roofline picture.

python -m benchmarks.gemm_report gemm-1B.json gemm-8B.json --plot kernels.svg
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deployments.engine.kernels.config import GemmConfig

SHAPES: dict[str, dict[str, tuple[int, int]]] = {
    "1B": {"qkv": (3072, 2048), "o": (2048, 2048), "gate_up": (16384, 2048), "down": (2048, 8192)},
    "8B": {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)},
    "32B": {"qkv": (7168, 5120), "o": (5120, 5120), "gate_up": (55296, 5120), "down": (5120, 27648)},
    "70B": {"qkv": (10240, 8192), "o": (8192, 8192), "gate_up": (57344, 8192), "down": (8192, 28672)},
}
"""[n, k] of the linears of one decoder layer, qkv and gate_up fused: Llama 3.2 1B and 3.1 8B and 70B, Qwen2.5 32B."""
OURS, CUBLAS, BITSANDBYTES = "headroom", "cublas", "bitsandbytes"
NAMES = {"4bit": "NF4", "8bit": "int8"}
GOALS = {"4bit": "55 % on the large ones", "8bit": "75 %"}
"""Share of the memory floor that was aimed at, up to `FEW` rows."""
FEW, SOME = 16, 128
"""Rows up to which the kernels are held against the floor, and against cuBLAS in bf16."""


@dataclass(frozen=True)
class Point:
    """One measurement."""

    model: str
    linear: str
    kind: str
    """4bit, 8bit, bf16."""
    contender: str
    rows: int
    microseconds: float
    floor: float
    """Microseconds."""
    config: GemmConfig | None = None


class Points:
    """Measurements, to be looked up."""

    def __init__(self, points: Iterable[Point]) -> None:
        self._points = {(p.model, p.linear, p.kind, p.contender, p.rows): p for p in points if p.contender != "variant"}

    def of(self, kind: str, contender: str = OURS) -> list[Point]:
        """All of one kind of weight and contender."""
        return [p for p in self._points.values() if (p.kind, p.contender) == (kind, contender)]

    def over(self, point: Point, contender: str) -> float | None:
        """A point's time over a contender's at the same product; None where that was not measured."""
        kind = "bf16" if contender == CUBLAS else point.kind
        other = self._points.get((point.model, point.linear, kind, contender, point.rows))
        return None if other is None else point.microseconds / other.microseconds

    def models(self) -> list[str]:
        """In the order of their size."""
        return [model for model in SHAPES if any(key[0] == model for key in self._points)]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables, and draw."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gemm_report", description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", help="what `benchmarks.gemm --json` wrote")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a picture, .svg or .png")
    options = parser.parse_args(argv)
    points = [point for file in options.files for point in read(file)]
    print("\n".join(report(points)))
    if options.plot:
        plot(points, options.plot)
    return 0


def read(file: Path) -> list[Point]:
    """What `benchmarks.gemm --json` wrote, without configurations."""
    fields: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["points"]
    return [Point(**{**each, "config": None}) for each in fields]


def report(points: Iterable[Point]) -> list[str]:
    """Tables in Markdown, a model and a kind of weight each, and how far the goals are met."""
    found, lines = Points(points), list[str]()
    lines.append("us (share of the floor; time over that of cuBLAS in bf16, over that of bitsandbytes):")
    for kind in NAMES:
        for model in found.models():
            lines += ["", *_table([p for p in found.of(kind) if p.model == model], found)]
    return [*lines, "", *goals(found)]


def _table(points: list[Point], found: Points) -> list[str]:
    if not points:
        return []
    cells = {(p.rows, p.linear): _cell(p, found) for p in points}
    first = points[0]
    linears = list(dict.fromkeys(p.linear for p in points))
    sizes = ("{}x{}".format(*SHAPES[first.model][linear]) for linear in linears)
    head = [f"{first.model}, {NAMES[first.kind]}", *map(" ".join, zip(linears, sizes, strict=True))]
    rows = [[f"M = {m}", *(cells.get((m, linear), "") for linear in linears)] for m in sorted({p.rows for p in points})]
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def _cell(point: Point, found: Points) -> str:
    ratios = (found.over(point, contender) for contender in (CUBLAS, BITSANDBYTES))
    over = ", ".join(f"{ratio:.2f}" for ratio in ratios if ratio is not None)
    return f"{point.microseconds:.1f} ({point.floor / point.microseconds:.0%}{f'; {over}' if over else ''})"


def goals(found: Points) -> list[str]:
    """A line for each of what was aimed at."""
    lines = []
    for kind, goal in GOALS.items():
        shares: dict[str, list[float]] = {}
        for p in found.of(kind):
            if p.rows <= FEW:
                shares.setdefault(f"{p.model} {p.linear}", []).append(p.floor / p.microseconds)
        ranges = ", ".join(f"{name} {min(some):.0%} to {max(some):.0%}" for name, some in shares.items())
        lines.append(f"{NAMES[kind]}, up to {FEW} rows, share of the floor (goal: {goal}): {ranges}")
    for kind, contender, most in (("4bit", CUBLAS, SOME), ("8bit", CUBLAS, SOME), ("4bit", BITSANDBYTES, None)):
        ratios = [(p, found.over(p, contender)) for p in found.of(kind) if most is None or p.rows <= most]
        compared = [(p, ratio) for p, ratio in ratios if ratio is not None]
        slower = [f"{p.model} {p.linear} at {p.rows} rows ({ratio:.2f})" for p, ratio in compared if ratio > 1]
        upto = "" if most is None else f" up to {most} rows"
        lines.append(
            f"{NAMES[kind]} slower than {contender}{upto}: {', '.join(slower) or 'nowhere'} (of {len(compared)})"
        )
    return lines


def plot(points: Iterable[Point], path: Path) -> None:
    """TFLOP/s by rows, a panel for each linear, under its roofs: what the memory floor allows each kind of weight, and
    the most that any product of 16-bit weights reached."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot

    found = Points(points)
    models = found.models()
    peak = max((_teraflops(p, p.microseconds) for p in found.of("bf16", CUBLAS)), default=math.inf)
    figure, axes = pyplot.subplots(
        len(models), 4, figsize=(15, 3.2 * len(models)), sharex=True, sharey=True, squeeze=False
    )
    lines = (("4bit", OURS, "C0"), ("8bit", OURS, "C2"), ("4bit", BITSANDBYTES, "C3"), ("bf16", CUBLAS, "0.3"))
    for model, row in zip(models, axes, strict=True):
        for linear, axis in zip(SHAPES[model], row, strict=True):
            for kind, contender, colour in lines:
                mine = [p for p in found.of(kind, contender) if (p.model, p.linear) == (model, linear)]
                mine.sort(key=lambda p: p.rows)
                rows, label = [p.rows for p in mine], f"{NAMES.get(kind, kind)} {contender}"
                axis.plot(rows, [_teraflops(p, p.microseconds) for p in mine], color=colour, marker=".", label=label)
                if contender != BITSANDBYTES:
                    roof = [min(peak, _teraflops(p, p.floor)) for p in mine]
                    axis.plot(rows, roof, color=colour, linestyle=":", linewidth=1)
            axis.set_title("{} {} {}x{}".format(model, linear, *SHAPES[model][linear]), fontsize=9)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
    for axis in axes[-1]:
        axis.set_xlabel("rows of x")
    for axis in axes[:, 0]:
        axis.set_ylabel("TFLOP/s")
    axes[0][0].legend(fontsize=7, title="dotted: their roofs", title_fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _teraflops(point: Point, microseconds: float) -> float:
    n, k = SHAPES[point.model][point.linear]
    return 2 * point.rows * n * k / microseconds / 1e6


if __name__ == "__main__":
    sys.exit(main())
