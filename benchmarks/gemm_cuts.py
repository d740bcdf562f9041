"""Time every cut of the CUDA kernels (`skinny.cu` up to 32 rows, `wide.cu` from 32 on) on the linears of real models,
beside the other ways.

    python -m benchmarks.gemm_cuts                                the linears of 8B, 1 to 2,048 rows
    python -m benchmarks.gemm_cuts --models 1B,8B --most 16 --table deployments/engine/kernels/tables/nvidia_h200.json

Timed as `benchmarks.gemm` does. For each linear and number of rows it prints microseconds, the best cuts and the floor.
`--most` times only so many cuts of each, those first that a GPU without a table would take. `--table` writes the best
cuts into a table, model by model, and keeps what else is there; several may write to one at once. 1 and 8 rows share a
cut, that with the least sum of both over their best. A number of rows that a table has no entry for is measured for the
next larger one that it has.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from filelock import FileLock

from benchmarks.gemm_report import SHAPES
from benchmarks.products import BOUND, copy_bandwidth, exact, floor_us, random_weight, relative_error, rotate
from deployments.engine.kernels import cut, slab
from deployments.engine.kernels.config import Kind, Table, cut_rows_of, parse_table
from deployments.engine.kernels.cut import MOST_ROWS, Cut, groups_of
from deployments.engine.kernels.slab import Slab
from deployments.engine.kernels.timing import cut_product, graph_time, over
from deployments.engine.kernels.tune import write_table

KINDS: tuple[Kind, Kind] = ("4bit", "8bit")
Times = dict[Cut | Slab, float]
"""Microseconds."""
Found = dict[tuple[Kind, int, int, int], tuple[Times, float]]
"""By kind, shape and rows: times, and that of the way without the CUDA kernels."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """One linear and number of rows to be measured."""

    name: str
    kind: Kind
    n: int
    k: int
    rows: int
    most: int | None = None
    """Cuts that are timed; None: all."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write what is asked for; 1 where a cut is wrong."""
    options = _arguments().parse_args(argv)
    began = time.monotonic()
    torch.manual_seed(0)
    rows_list = tuple(int(rows) for rows in options.rows.split(","))
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}: copy {bandwidth / 1e12:.2f} TB/s; us, share of the floor")
    wrong = 0
    for model in options.models.split(","):
        shapes = SHAPES[model]
        wanted = [
            Wanted(f"{model} {linear}", kind, n, k, rows, options.most)
            for kind in KINDS
            for linear, (n, k) in shapes.items()
            for rows in rows_list
        ]
        compile_ahead(wanted, options.processes)
        print(f"compiled after {time.monotonic() - began:.0f} s", flush=True)
        found: Found = {}
        for each in wanted:
            times, other, errors = measure(each, bandwidth)
            found[each.kind, each.n, each.k, each.rows] = times, other
            wrong += errors
        if options.table:
            add_to(options.table, found)
    print(f"took {time.monotonic() - began:.0f} s")
    return int(wrong > 0)


def compile_ahead(wanted: Iterable[Wanted], processes: int) -> None:
    """All kernels, `processes` at a time: NVRTC lets others run meanwhile."""
    from deployments.engine.kernels.cubin import compiled
    from deployments.engine.kernels.skinny import architecture, macros

    todo: dict[tuple[str, str, tuple[tuple[str, int], ...]], None] = {}
    for each in wanted:
        operands = {"BITS": _bits(each.kind), "HALF": 0, "PER_SCALE": 1, "NESTED": 0}
        for way in every(each):
            if isinstance(way, Slab):
                todo["wide", "sm_90a", tuple((way.macros() | operands).items())] = None
            else:
                todo["skinny", architecture(), tuple(macros(way, groups_of(each.rows), operands).items())] = None
    with ThreadPoolExecutor(processes) as pool:
        list(pool.map(lambda of: compiled(of[0], dict(of[2]), of[1]), todo))


def every(wanted: Wanted) -> list[Cut | Slab]:
    """What is timed on this GPU; what its table has is among it."""
    from deployments.engine.kernels.launch import clusters, multiprocessors, shared_bytes, table_of, warpgroups

    device = torch.device("cuda", torch.cuda.current_device())
    found = list[Cut | Slab]()
    if wanted.rows <= MOST_ROWS and clusters(device):
        found += first_cuts(wanted, multiprocessors(device), shared_bytes(device))
    if wanted.rows >= MOST_ROWS and warpgroups(device):
        found += first_slabs(wanted, multiprocessors(device), shared_bytes(device))
    known = table_of(device).entry(wanted.kind, wanted.n, wanted.k).cuts.get(cut_rows_of(wanted.rows) or 0)
    return [*found, known] if known is not None and known not in found else found


def first_cuts(wanted: Wanted, multiprocessors: int, shared: int) -> list[Cut]:
    """For `skinny.cu`, those first that are thought best where none was measured."""
    n, k, bits = wanted.n, wanted.k, _bits(wanted.kind)
    cuts = cut.candidates(n, k, bits, groups_of(wanted.rows), shared, thorough=wanted.most is None)
    return sorted(cuts, key=lambda each: cut.rank(each, n, k, multiprocessors))[: wanted.most]


def first_slabs(wanted: Wanted, multiprocessors: int, shared: int) -> list[Slab]:
    """The same for `wide.cu`."""
    n, k, rows = wanted.n, wanted.k, wanted.rows
    slabs = slab.candidates(n, k, _bits(wanted.kind), rows, shared)
    return sorted(slabs, key=lambda each: slab.rank(each, n, k, rows, multiprocessors))[: wanted.most]


def measure(wanted: Wanted, bandwidth: float) -> tuple[Times, float, int]:
    """Times by cut, the other kernels', and how many cuts were wrong."""
    from deployments.engine.kernels.launch import product_without_cuda

    kind, n, k, rows = wanted.kind, wanted.n, wanted.k, wanted.rows
    weight = random_weight(kind, n, k)
    weights = rotate(lambda: random_weight(kind, n, k), weight.bytes)
    x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
    reference = x.double() @ exact(weight).t()
    times: Times = {}
    wrong = 0
    for each in every(wanted):
        error = relative_error(cut_product(x, each, weight), reference)
        if error >= BOUND:
            print(f"WRONG {wanted.name} {kind} {rows} rows {each}: error {error:.1e}")
            wrong += 1
        else:
            times[each] = graph_time(over(weights, partial(cut_product, x, each)), repeats=3)
    other = graph_time(over(weights, partial(product_without_cuda, x)))
    dense = rotate(lambda: torch.randn(n, k, device="cuda", dtype=torch.bfloat16), 2 * n * k)
    cublas = graph_time(over(dense, lambda w: x @ w.t()))
    floor = floor_us(weight.bytes, rows, n, k, bandwidth)
    best = sorted(times, key=times.__getitem__)[:3]
    print(
        f"{wanted.name:10s} {kind} {rows:4d} rows: floor {floor:6.1f}, bf16 cuBLAS {cublas:6.1f}, "
        f"without CUDA {other:6.1f}, best of {len(times)} cuts "
        + ", ".join(f"{times[each]:.1f} ({floor / times[each]:.0%}) {tuple(asdict(each).values())}" for each in best),
        flush=True,
    )
    return times, other, wrong


def add_to(path: Path, found: Found) -> None:
    """The best cuts into the table at `path`; others may add to it meanwhile."""
    with FileLock(path.with_suffix(".lock")):
        table = parse_table(json.loads(path.read_text(encoding="utf-8")))
        write_table(with_cuts(table, found), path)


def with_cuts(table: Table, found: Found) -> Table:
    """The table with the best cut of each shape and group of rows, or none where the other kernel is faster."""
    for kind, n, k, _ in dict.fromkeys((*key[:3], 0) for key in found):
        cuts: dict[int, Cut | Slab | None] = dict(table.entry(kind, n, k).cuts) if table.knows(kind, n, k) else {}
        runs: dict[int, list[tuple[Times, float]]] = {}
        for (*shape, rows), times in found.items():
            if tuple(shape) == (kind, n, k):
                most = cut_rows_of(rows)
                assert most is not None, f"no table has cuts for {rows} rows"
                runs.setdefault(most, []).append(times)
        for most, measured in runs.items():
            cuts[most] = _best(measured)
        table = table.with_shape(kind, n, k, replace(table.entry(kind, n, k), cuts=cuts))
    return table


def _best(measured: list[tuple[Times, float]]) -> Cut | Slab | None:
    common = set.intersection(*(set(times) for times, _ in measured))
    if not common:
        return None
    best = min(common, key=lambda each: sum(times[each] / min(times.values()) for times, _ in measured))
    return best if sum(times[best] for times, _ in measured) < sum(other for _, other in measured) else None


def _bits(kind: Kind) -> int:
    return int(kind.removesuffix("bit"))


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="8B", help="comma-separated, of " + ", ".join(SHAPES))
    parser.add_argument("--rows", default="1,8,16,32,64,128,256,512,1024,2048", help="2,048 at most")
    parser.add_argument("--most", type=int, metavar="N", help="cuts that are timed of each; default: all")
    parser.add_argument("--processes", type=int, default=12, help="compilers at once")
    parser.add_argument("--table", type=Path, help="write the best cuts into this table")
    return parser


if __name__ == "__main__":
    sys.exit(main())
