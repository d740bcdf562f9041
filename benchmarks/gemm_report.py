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
SHARES = {"4bit": (0.55, 50_000_000), "8bit": (0.75, 0)}
"""Of the memory floor, what was aimed at up to `FEW` rows, for linears of at least so many weights."""
RIVALS = (("4bit", CUBLAS), ("8bit", CUBLAS), ("4bit", BITSANDBYTES))
"""Which was not to be slower than which: than cuBLAS in bf16 up to `SOME` rows, than bitsandbytes for any number."""
FEW, SOME = 16, 128


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

    @property
    def weights(self) -> int:
        """Of its linear."""
        n, k = SHAPES[self.model][self.linear]
        return n * k


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
    """A line for each of what was aimed at: met, or by which products it is missed."""
    lines = []
    for kind, (least, weights) in SHARES.items():
        size = f"{weights / 1e6:.0f} million weights and more" if weights else "any size"
        shares = [(p, p.floor / p.microseconds) for p in found.of(kind) if p.rows <= FEW and p.weights >= weights]
        missed = [f"{_named(p)} ({share:.1%})" for p, share in shares if share < least]
        goal = f"at least {least:.0%} of the floor up to {FEW} rows, linears of {size}"
        lines.append(_verdict(f"{NAMES[kind]}, {goal}", missed, len(shares)))
    for kind, rival in RIVALS:
        upto = f" up to {SOME} rows" if rival == CUBLAS else ""
        mine = [p for p in found.of(kind) if p.rows <= SOME or not upto]
        ratios = [(p, ratio) for p in mine if (ratio := found.over(p, rival)) is not None]
        missed = [f"{_named(p)} ({ratio:.2f})" for p, ratio in ratios if ratio > 1]
        lines.append(_verdict(f"{NAMES[kind]}, never slower than {rival}{upto}", missed, len(ratios)))
    return lines


def _named(point: Point) -> str:
    return f"{point.model} {point.linear} at {point.rows} row{'s' * (point.rows > 1)}"


def _verdict(goal: str, missed: list[str], measured: int) -> str:
    if not measured:
        return f"not measured: {goal}"
    if missed:
        return f"MISSED by {len(missed)} of {measured}: {goal}: {', '.join(missed)}"
    return f"met by all {measured}: {goal}"


def plot(points: Iterable[Point], path: Path) -> None:
    """TFLOP/s by rows, a panel for each linear, under its roofs: what the memory floor allows each kind of weight, and
    the most that any product of 16-bit weights reached."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "gemm"}
    from matplotlib import pyplot

    found = Points(points)
    models = found.models()
    peak = max((_teraflops(p, p.microseconds) for p in found.of("bf16", CUBLAS)), default=math.inf)
    figure, axes = pyplot.subplots(
        len(models), 4, figsize=(12, 2.6 * len(models)), sharex=True, sharey=True, squeeze=False
    )
    lines = (("4bit", OURS, "C0"), ("8bit", OURS, "C2"), ("4bit", BITSANDBYTES, "C3"), ("bf16", CUBLAS, "0.3"))
    for model, row in zip(models, axes, strict=True):
        for linear, axis in zip(SHAPES[model], row, strict=True):
            for kind, contender, colour in lines:
                mine = [p for p in found.of(kind, contender) if (p.model, p.linear) == (model, linear)]
                mine.sort(key=lambda p: p.rows)
                rows, label = [p.rows for p in mine], f"{NAMES.get(kind, kind)} {contender}"
                axis.plot(rows, [_teraflops(p, p.microseconds) for p in mine], color=colour, label=label)
                if contender != BITSANDBYTES:
                    roof = [min(peak, _teraflops(p, p.floor)) for p in mine]
                    axis.plot(rows, roof, color=colour, linestyle=":", linewidth=1)
            axis.set_title("{} {} {}x{}".format(model, linear, *SHAPES[model][linear]), fontsize=9)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.minorticks_off()
            axis.xaxis.set_major_formatter("{x:.0f}")
            axis.yaxis.set_major_formatter("{x:.0f}")
    for axis in axes[-1]:
        axis.set_xlabel("rows of x")
    for axis in axes[:, 0]:
        axis.set_ylabel("TFLOP/s")
    axes[0][0].legend(fontsize=7, title="dotted: their roofs", title_fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Date": None})
    pyplot.close(figure)


def _teraflops(point: Point, microseconds: float) -> float:
    return 2 * point.rows * point.weights / microseconds / 1e6


if __name__ == "__main__":
    sys.exit(main())
