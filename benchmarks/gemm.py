"""Time the kernels' products against bitsandbytes, 16-bit cuBLAS and the memory floor, on the linears of real models.

    python -m benchmarks.gemm                      check every configuration, compare them, then the table of 8B
    python -m benchmarks.gemm --models 1B,8B,32B,70B --skip-variants --json gemm.json --plot gemm.svg
    ncu --set full --clock-control none -k regex:linear_ -c 4 python -m benchmarks.gemm --launch 4bit,16

A call's time is a CUDA graph's, divided by its calls; weights rotate through more memory than the L2 cache holds. The
floor is the bytes that must move (weight, scales, x and output, each once) over the bandwidth of a large copy.
Nothing is timed before its result agrees with a float64 product of the dequantised weight.

"headroom" is what the engine's linears call: `skinny.cu`, `wide.cu`, Triton's kernels or dequantising, as the table of
this GPU says. "triton" and "dequantise" are these two ways alone, which `--table` needs for the crossover.
"bitsandbytes" is in int8 LLM.int8() at threshold 0, which rounds x to 8 bits too. The report says which goals are met.
`benchmarks.gemm_report` makes tables and the picture of several files that `--json` wrote.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks.gemm_report import BITSANDBYTES, CUBLAS, OURS, SHAPES, Point, plot, report
from benchmarks.gemm_variants import (
    best_table,
    check_variants,
    compile_ahead,
    launch_all,
    print_variants,
    time_variants,
)
from benchmarks.products import BOUND, copy_bandwidth, exact, floor_us, random_weight, relative_error, rotate
from deployments.engine.kernels.config import BUCKETS, GemmConfig, Kind, Table, bucket_of
from deployments.engine.kernels.timing import graph_time, over
from deployments.engine.kernels.tune import CANDIDATES, write_table

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024)
CONTENDERS = (CUBLAS, OURS, "triton", "dequantise", BITSANDBYTES)


def with_crossovers(table: Table, points: list[Point]) -> Table:
    """The table with each timed shape's crossover: the most rows for which the kernel beat dequantising."""
    kinds: tuple[Kind, Kind] = ("4bit", "8bit")
    for kind in kinds:
        found = []
        for model, linear in dict.fromkeys((p.model, p.linear) for p in points if p.kind == kind):
            mine = [p for p in points if (p.model, p.linear, p.kind) == (model, linear, kind)]
            small = {p.rows: p.microseconds for p in mine if p.contender == "triton"}
            whole = {p.rows: p.microseconds for p in mine if p.contender == "dequantise"}
            both = sorted(small.keys() & whole.keys())
            found.append(max((rows for rows in both if small[rows] <= whole[rows]), default=BUCKETS[0]))
            n, k = SHAPES[model][linear]
            table = table.with_shape(kind, n, k, replace(table.entry(kind, n, k), crossover=found[-1]))
        if found:
            entry = replace(table.default[kind], crossover=min(found))
            table = replace(table, default={**table.default, kind: entry})
    return table


def time_contenders(
    model: str, table: Table, rows_list: tuple[int, ...], bandwidth: float, contenders: Sequence[str]
) -> list[Point]:
    """Contenders on the linears of one model."""
    points = []
    kinds: tuple[Kind, Kind] = ("4bit", "8bit")
    for linear, (n, k) in SHAPES[model].items():
        if CUBLAS in contenders:
            dense = rotate(lambda n=n, k=k: torch.randn(n, k, device="cuda", dtype=torch.bfloat16), 2 * n * k)
            for rows in rows_list:
                x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
                floor = floor_us(2 * n * k, rows, n, k, bandwidth)
                took = graph_time(over(dense, lambda w, x=x: torch.nn.functional.linear(x, w)))
                points.append(Point(model, linear, "bf16", CUBLAS, rows, took, floor))
            del dense
        for kind in kinds:
            points += _time_quantised(model, linear, kind, table, rows_list, bandwidth, contenders)
    return points


def _time_quantised(
    model: str,
    linear: str,
    kind: Kind,
    table: Table,
    rows_list: tuple[int, ...],
    bandwidth: float,
    contenders: Sequence[str],
) -> list[Point]:
    n, k = SHAPES[model][linear]
    first = random_weight(kind, n, k)
    wide = exact(first)
    weights = rotate(lambda: random_weight(kind, n, k), first.bytes)
    weights[0] = first
    theirs = _bitsandbytes_weights(kind, n, k, len(weights)) if BITSANDBYTES in contenders else []
    points = []
    for rows in rows_list:
        x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
        floor = floor_us(first.bytes, rows, n, k, bandwidth)
        expected = x.double() @ wide.t()
        config = table.entry(kind, n, k).configs[bucket_of(rows)]
        for name, call in _ways(x, config, contenders).items():
            if (error := relative_error(call(first), expected)) > BOUND:
                print(f"  WRONG {name} {kind} {linear} rows {rows}: error {error:.1e}")
            used = config if name == "triton" else None
            points.append(Point(model, linear, kind, name, rows, graph_time(over(weights, call)), floor, used))
        if theirs:
            took = graph_time(over(theirs, partial(_bitsandbytes_product, x if kind == "4bit" else x.half())))
            points.append(Point(model, linear, kind, BITSANDBYTES, rows, took, floor))
    return points


def _ways(x: Tensor, config: GemmConfig, contenders: Sequence[str]) -> dict[str, Callable[[Any], Tensor]]:
    """This project's products of x with a weight, those that are asked for and make sense at its number of rows."""
    from deployments.engine.kernels.launch import dequantised_product, product, small_product

    rows = x.shape[0]
    ways: dict[str, Callable[[Any], Tensor]] = {OURS: lambda weight: product(x, weight, None)}
    if rows <= 4 * BUCKETS[-1]:
        ways["triton"] = lambda weight: small_product(x, weight, None, config, bucket=bucket_of(rows))
    if rows >= 32:
        ways["dequantise"] = lambda weight: dequantised_product(x, weight, None)
    return {name: way for name, way in ways.items() if name in contenders}


def _bitsandbytes_weights(kind: Kind, n: int, k: int, count: int) -> list[Any]:
    """As its products take them: bytes and their state."""
    try:
        from bitsandbytes.autograd._functions import MatmulLtState
        from bitsandbytes.functional import QuantState
    except ImportError:
        return []
    made: list[Any] = []
    for _ in range(count):
        weight = random_weight(kind, n, k, tiled=False)
        if kind == "4bit":
            shape = torch.Size((n, k))
            state = QuantState(weight.absmax, shape, weight.code, 64, quant_type="nf4", dtype=torch.bfloat16)
        else:
            state = MatmulLtState(CB=weight.packed, SCB=weight.absmax)
            state.is_training = state.has_fp16_weights = False
        made.append((weight.packed, state))
    return made


def _bitsandbytes_product(x: Tensor, weight: Any) -> Tensor:
    """In 8 bits LLM.int8() without outliers, which takes float16 and rounds it to 8 bits too."""
    import bitsandbytes as bnb

    packed, state = weight
    if isinstance(state, bnb.functional.QuantState):
        return cast("Tensor", bnb.matmul_4bit(x, packed.t(), quant_state=state))
    return cast("Tensor", bnb.matmul(x, packed, state=state))


def print_contenders(points: list[Point]) -> None:
    """A line per linear and contender: microseconds by rows, with the floor."""
    rows_list = sorted({p.rows for p in points})
    print("\nus per call by rows" + " " * 26 + "".join(f"{rows:>9}" for rows in rows_list))
    keys = list(dict.fromkeys((p.model, p.linear, p.kind, p.contender) for p in points))
    for key in keys:
        by_rows = {p.rows: p for p in points if (p.model, p.linear, p.kind, p.contender) == key}
        cells = "".join(f"{by_rows[r].microseconds:9.1f}" if r in by_rows else " " * 9 for r in rows_list)
        shares = "".join(
            f"{100 * by_rows[r].floor / by_rows[r].microseconds:8.0f}%" if r in by_rows else " " * 9 for r in rows_list
        )
        print(f"{key[0]:4s}{key[1]:9s}{key[2]:6s}{key[3]:14s} us     {cells}")
        if key[3] in (OURS, CUBLAS):
            print(" " * 33 + f" floor  {shares}")


def main(argv: list[str] | None = None) -> int:
    """Returns 1 where a configuration of the table is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="8B", help="comma-separated, of " + ", ".join(SHAPES))
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--buckets", default=",".join(map(str, BUCKETS)), help="of the variants compared")
    parser.add_argument("--skip-variants", action="store_true")
    parser.add_argument("--skip-contenders", action="store_true")
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help="default: %(default)s")
    parser.add_argument("--processes", type=int, default=12, help="compilers at once")
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--launch", help="KIND,ROWS: only launch each of its configurations on gate_up of 8B, to profile"
    )
    parser.add_argument("--table", type=Path, help="write the best configurations here, as the kernels read them")
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args(argv)
    from deployments.engine.kernels.launch import table_of

    began = time.monotonic()
    torch.manual_seed(0)
    if args.launch:
        launch_all(*args.launch.split(","))
        return 0
    asked = args.contenders.split(",")
    if unknown := set(asked) - set(CONTENDERS):
        parser.error(f"--contenders: {', '.join(sorted(unknown))}: there are {', '.join(CONTENDERS)}")
    device = torch.device("cuda", torch.cuda.current_device())
    buckets = tuple(int(b) for b in args.buckets.split(","))
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}: copy {bandwidth / 1e12:.2f} TB/s")
    table = table_of(device)
    points: list[Point] = []
    wrong: dict[tuple[Kind, int, GemmConfig], str] = {}
    if not args.skip_variants:
        pairs = [(kind, bucket, c) for (kind, bucket), cs in CANDIDATES.items() if bucket in buckets for c in cs]
        compile_ahead(pairs, args.processes)
        print(f"compiled after {time.monotonic() - began:.0f} s")
        wrong = check_variants(pairs)
        points += time_variants("8B", wrong, bandwidth, buckets)
        table = best_table(points, table)
        print_variants(points)
    if not args.skip_contenders:
        rows_list = tuple(int(r) for r in args.rows.split(","))
        timed = [p for m in args.models.split(",") for p in time_contenders(m, table, rows_list, bandwidth, asked)]
        print_contenders(timed)
        print("\n".join(report(timed)))
        if {"triton", "dequantise"} <= set(asked):
            table = with_crossovers(table, timed)
        points += timed
    if args.table:
        write_table(table, args.table)
    if args.json:
        args.json.write_text(json.dumps({"bandwidth": bandwidth, "points": [asdict(p) for p in points]}, indent=1))
    if args.plot and not args.skip_contenders:
        plot(timed, args.plot)
    print(f"took {time.monotonic() - began:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
