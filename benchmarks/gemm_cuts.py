"""Time every cut of the kernel for few rows (`skinny.cu`) on the linears of real models, beside the other ways.

    python -m benchmarks.gemm_cuts                                the linears of 8B, 1, 8, 16 and 32 rows
    python -m benchmarks.gemm_cuts --models 1B,8B --table deployments/engine/kernels/tables/nvidia_h200.json

Timed as `benchmarks.gemm` does. For each linear and number of rows it prints microseconds, the best cuts and the floor.
`--table` writes the best cuts into a table; 1 and 8 rows share one, that with the least sum of both over their best.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gemm import BOUND, SHAPES, copy_bandwidth, exact, floor_us, random_weight, relative_error, rotate
from deployments.engine.kernels.config import Kind, Table, parse_table
from deployments.engine.kernels.cut import Cut, candidates, groups_of
from deployments.engine.kernels.tune import graph_time, over, write_table

KINDS: tuple[Kind, Kind] = ("4bit", "8bit")
Times = dict[Cut, float]
"""Microseconds."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write what is asked for; 1 where a cut is wrong."""
    options = _arguments().parse_args(argv)
    began = time.monotonic()
    torch.manual_seed(0)
    rows_list = tuple(int(rows) for rows in options.rows.split(","))
    shapes = [(model, linear, shape) for model in options.models.split(",") for linear, shape in SHAPES[model].items()]
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}: copy {bandwidth / 1e12:.2f} TB/s; us, share of the floor")
    compile_ahead(
        [(kind, shape, rows) for kind in KINDS for *_, shape in shapes for rows in rows_list], options.processes
    )
    print(f"compiled after {time.monotonic() - began:.0f} s", flush=True)
    found: dict[tuple[Kind, int, int, int], tuple[Times, float]] = {}
    wrong = 0
    for kind in KINDS:
        for model, linear, (n, k) in shapes:
            for rows in rows_list:
                times, other, errors = measure(kind, n, k, rows, bandwidth, f"{model} {linear}")
                found[kind, n, k, rows] = times, other
                wrong += errors
    if options.table:
        table = parse_table(json.loads(options.table.read_text(encoding="utf-8")))
        write_table(with_cuts(table, found), options.table)
    print(f"took {time.monotonic() - began:.0f} s")
    return int(wrong > 0)


def compile_ahead(wanted: list[tuple[Kind, tuple[int, int], int]], processes: int) -> None:
    """All kernels, `processes` at a time: NVRTC lets others run meanwhile."""
    from deployments.engine.kernels.launch import shared_bytes
    from deployments.engine.kernels.skinny import compiled

    shared = shared_bytes(torch.device("cuda", torch.cuda.current_device()))
    todo = {
        (cut, _bits(kind), groups_of(rows))
        for kind, (n, k), rows in wanted
        for cut in candidates(n, k, _bits(kind), groups_of(rows), shared, wide=True)
    }
    with ThreadPoolExecutor(processes) as pool:
        list(pool.map(lambda of: compiled(*of, half=False, per_scale=1, nested=False), todo))


def measure(kind: Kind, n: int, k: int, rows: int, bandwidth: float, name: str) -> tuple[Times, float, int]:
    """Of one linear: times by cut, the other kernel's, and how many cuts were wrong."""
    from deployments.engine.kernels.launch import product_of_more, shared_bytes
    from deployments.engine.kernels.skinny import skinny_product

    weight = random_weight(kind, n, k)
    weights = rotate(lambda: random_weight(kind, n, k), weight.bytes)
    x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
    reference = x.double() @ exact(weight).t()
    times: Times = {}
    wrong = 0
    for cut in candidates(n, k, _bits(kind), groups_of(rows), shared_bytes(x.device), wide=True):
        error = relative_error(skinny_product(x, weight, None, cut), reference)
        if error >= BOUND:
            print(f"WRONG {name} {kind} {rows} rows {cut}: error {error:.1e}")
            wrong += 1
        else:
            times[cut] = graph_time(over(weights, partial(_few, x, cut)), repeats=3)
    other = graph_time(over(weights, partial(product_of_more, x)))
    dense = rotate(lambda: torch.randn(n, k, device="cuda", dtype=torch.bfloat16), 2 * n * k)
    cublas = graph_time(over(dense, lambda w: x @ w.t()))
    floor = floor_us(weight.bytes, rows, n, k, bandwidth)
    best = sorted(times, key=times.__getitem__)[:3]
    print(
        f"{name:10s} {kind} {rows:3d} rows: floor {floor:6.1f}, bf16 cuBLAS {cublas:6.1f}, Triton {other:6.1f}, "
        f"best of {len(times)} cuts "
        + ", ".join(f"{times[cut]:.1f} ({floor / times[cut]:.0%}) {tuple(asdict(cut).values())}" for cut in best),
        flush=True,
    )
    return times, other, wrong


def with_cuts(table: Table, found: dict[tuple[Kind, int, int, int], tuple[Times, float]]) -> Table:
    """The table with the best cut of each shape and group of rows, or none where the other kernel is faster."""
    for kind, n, k, _ in dict.fromkeys((*key[:3], 0) for key in found):
        cuts: dict[int, Cut | None] = dict(table.entry(kind, n, k).cuts) if table.knows(kind, n, k) else {}
        runs: dict[int, list[tuple[Times, float]]] = {}
        for (*shape, rows), times in found.items():
            if tuple(shape) == (kind, n, k):
                runs.setdefault(8 * groups_of(rows), []).append(times)
        for most, measured in runs.items():
            cuts[most] = _best(measured)
        table = table.with_shape(kind, n, k, replace(table.entry(kind, n, k), cuts=cuts))
    return table


def _best(measured: list[tuple[Times, float]]) -> Cut | None:
    common = set.intersection(*(set(times) for times, _ in measured))
    if not common:
        return None
    best = min(common, key=lambda cut: sum(times[cut] / min(times.values()) for times, _ in measured))
    return best if sum(times[best] for times, _ in measured) < sum(other for _, other in measured) else None


def _few(x: Tensor, cut: Cut, weight: Any) -> Tensor:
    from deployments.engine.kernels.skinny import skinny_product

    return skinny_product(x, weight, None, cut)


def _bits(kind: Kind) -> int:
    return int(kind.removesuffix("bit"))


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="8B", help="comma-separated, of " + ", ".join(SHAPES))
    parser.add_argument("--rows", default="1,8,16,32", help="32 at most")
    parser.add_argument("--processes", type=int, default=12, help="compilers at once")
    parser.add_argument("--table", type=Path, help="write the best cuts into this table")
    return parser


if __name__ == "__main__":
    sys.exit(main())
