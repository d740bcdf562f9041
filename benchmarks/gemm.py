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
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks.gemm_report import BITSANDBYTES, CUBLAS, OURS, SHAPES, Point, plot, report
from deployments.engine.kernels.config import BUCKETS, HEURISTIC, Entry, GemmConfig, Kind, Table, bucket_of
from deployments.engine.kernels.timing import graph_time, over
from deployments.engine.kernels.tune import CANDIDATES, write_table
from deployments.engine.kernels.weights import Nested, Weight4, Weight8, dequantise4, dequantise8, tile4, tile8

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024)
ROTATED_BYTES = 256 * 2**20
"""Several times the L2 cache."""
CONTENDERS = (CUBLAS, OURS, "triton", "dequantise", BITSANDBYTES)
BOUND = 3e-3
"""On |out - ref| / |ref|, in bfloat16."""
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def random_weight(kind: Kind, n: int, k: int, *, tiled: bool = True, nested: bool = False, blocksize: int = 64) -> Any:
    """A weight of random codes and scales."""
    if kind == "8bit":
        codes = torch.randint(-127, 128, (n, k), dtype=torch.int8, device="cuda")
        weight8 = Weight8(n, k, codes, torch.rand(n, device="cuda") * 0.1 + 0.01)
        return tile8(weight8) if tiled else weight8
    packed = torch.randint(0, 256, ((n * k + 1) // 2, 1), dtype=torch.uint8, device="cuda")
    blocks = -(-n * k // blocksize)
    code = torch.tensor(NF4, device="cuda")
    outer = None
    absmax = torch.rand(blocks, device="cuda") * 0.05 + 0.01
    if nested:
        absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8, device="cuda")
        inner = torch.rand(-(-blocks // 256), device="cuda") * 0.02 + 0.01
        outer = Nested(inner, torch.linspace(-1, 1, 256, device="cuda"), torch.tensor([0.03], device="cuda"))
    weight4 = Weight4(n, k, blocksize, packed, absmax, code, outer)
    return tile4(weight4) if tiled else weight4


def exact(weight: Any) -> Tensor:
    """float64 [n, k]."""
    return dequantise4(weight, torch.float64) if isinstance(weight, Weight4) else dequantise8(weight, torch.float64)


def relative_error(out: Tensor, expected: Tensor) -> float:
    """|out - expected| / |expected|; infinite for NaN."""
    error = float((out.double() - expected).norm() / expected.norm())
    return error if math.isfinite(error) else math.inf


def copy_bandwidth() -> float:
    """Bytes read and written per second by a large copy on the device: the best of twenty, in eager mode (copies in a
    CUDA graph run slower)."""
    source = torch.randint(0, 2**15, (2**30,), dtype=torch.int16, device="cuda")
    target = torch.empty_like(source)
    best = math.inf
    for _ in range(20):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) * 1e-3)
    return 2 * source.nbytes / best


def rotate(make: Callable[[], Any], nbytes: int) -> list[Any]:
    """Enough copies of something of `nbytes` that none is still in the cache when it is used again."""
    return [make() for _ in range(max(2, min(64, math.ceil(ROTATED_BYTES / nbytes))))]


def floor_us(weight_bytes: int, rows: int, n: int, k: int, bandwidth: float) -> float:
    """Microseconds for weight, x and output, each moved once."""
    return (weight_bytes + 2 * rows * (n + k)) / bandwidth * 1e6


def check_variants(pairs: list[tuple[Kind, int, GemmConfig]]) -> dict[tuple[Kind, int, GemmConfig], str]:
    """Every configuration on an even and an odd shape, twice: what is wrong with it, by configuration."""
    from deployments.engine.kernels.launch import small_product

    wrong: dict[tuple[Kind, int, GemmConfig], str] = {}
    worst = 0.0
    for kind, bucket, config in pairs:
        for n, k, rows in ((2048, 1024, bucket), (592, 704, max(1, bucket - 3))):
            weight = random_weight(kind, n, k)
            x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
            try:
                torch.full((rows, n), math.nan, device="cuda", dtype=torch.bfloat16)  # poison what `empty` returns
                out = small_product(x, weight, None, config, bucket=bucket)
                again = small_product(x, weight, None, config, bucket=bucket)
                error = relative_error(out, x.double() @ exact(weight).t())
            except Exception as failure:  # noqa: BLE001 - the other variants are still worth their time
                wrong[kind, bucket, config] = f"{type(failure).__name__}: {str(failure).splitlines()[0][:120]}"
                continue
            worst = max(worst, error)
            if error > BOUND or not torch.equal(out, again):
                wrong[kind, bucket, config] = f"error {error:.1e}, repeatable {torch.equal(out, again)} at {n}x{k}"
    print(f"checked {len(pairs)} configurations, worst error of the right ones {worst:.1e}, {len(wrong)} wrong")
    for key, why in wrong.items():
        print("  WRONG", key, why)
    return wrong


def compile_ahead(pairs: list[tuple[Kind, int, GemmConfig]], processes: int) -> None:
    """Fill Triton's cache in parallel: one compiler per process."""
    with get_context("spawn").Pool(processes) as pool:
        pool.map(_compile_share, [pairs[i::processes] for i in range(processes)])


def _compile_share(pairs: list[tuple[Kind, int, GemmConfig]]) -> None:
    from deployments.engine.kernels.launch import small_product

    for kind, bucket, config in pairs:
        for n, k in ((2048, 1024), (592, 704)):
            x = torch.randn(bucket, k, device="cuda", dtype=torch.bfloat16)
            try:
                small_product(x, random_weight(kind, n, k), None, config, bucket=bucket)
            except Exception:  # noqa: BLE001 - reported by check_variants
                continue


def time_variants(
    model: str, wrong: Iterable[tuple[Kind, int, GemmConfig]], bandwidth: float, buckets: tuple[int, ...]
) -> list[Point]:
    """All right configurations on the linears of one model, at full buckets."""
    from deployments.engine.kernels.launch import small_product

    points = []
    bad = set(wrong)
    kinds: tuple[Kind, Kind] = ("4bit", "8bit")
    for kind in kinds:
        for linear, (n, k) in SHAPES[model].items():
            first = random_weight(kind, n, k)
            weights = rotate(lambda kind=kind, n=n, k=k: random_weight(kind, n, k), first.bytes)
            for bucket in buckets:
                x = torch.randn(bucket, k, device="cuda", dtype=torch.bfloat16)
                floor = floor_us(first.bytes, bucket, n, k, bandwidth)
                for config in CANDIDATES[kind, bucket]:
                    if (kind, bucket, config) in bad:
                        continue
                    calls = over(weights, lambda w, x=x, c=config, b=bucket: small_product(x, w, None, c, bucket=b))
                    try:
                        took = graph_time(calls)
                    except ValueError as error:
                        print(f"  NOT RUN {kind} {bucket} {config}: {error}")
                        continue
                    points.append(Point(model, linear, kind, "variant", bucket, took, floor, config))
            del weights
    return points


def best_table(points: list[Point], known: Table) -> Table:
    """The fastest configuration of each shape and bucket; for other shapes, the one whose times over the floor have the
    least geometric mean. The crossover is the heuristic's until `with_crossovers`; cuts are those of `known`, which
    `benchmarks.gemm_cuts` measures."""
    table = HEURISTIC
    kinds: tuple[Kind, Kind] = ("4bit", "8bit")
    for kind in kinds:
        mine = [p for p in points if p.kind == kind and p.config is not None]
        shapes = {(p.model, p.linear): SHAPES[p.model][p.linear] for p in mine}
        default = dict(table.default[kind].configs)
        own: dict[tuple[int, int], dict[int, GemmConfig]] = {shape: dict(default) for shape in shapes.values()}
        for bucket in sorted({p.rows for p in mine}):
            scores: dict[GemmConfig, list[float]] = {}
            for p in mine:
                if p.rows == bucket and p.config is not None:
                    scores.setdefault(p.config, []).append(math.log(p.microseconds / p.floor))
            default[bucket] = min(scores, key=lambda c, scores=scores: statistics.mean(scores[c]))  # type: ignore[misc]  # a default binds the loop variable
            for name, shape in shapes.items():
                times = {p.config: p.microseconds for p in mine if (p.model, p.linear) == name and p.rows == bucket}
                own[shape][bucket] = min(times, key=times.__getitem__)
        table = replace(table, default={**table.default, kind: Entry(default, table.default[kind].crossover)})
        for (n, k), configs in own.items():
            table = table.with_shape(
                kind, n, k, Entry(configs, table.default[kind].crossover, known.entry(kind, n, k).cuts)
            )
    return table


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


def launch_all(kind: Kind, rows: str) -> None:
    """Each configuration once, in order."""
    from deployments.engine.kernels.launch import small_product

    n, k = SHAPES["8B"]["gate_up"]
    weight = random_weight(kind, n, k)
    x = torch.randn(int(rows), k, device="cuda", dtype=torch.bfloat16)
    for config in CANDIDATES[kind, int(rows)]:
        print(config)
        small_product(x, weight, None, config, bucket=int(rows))
        torch.cuda.synchronize()


def print_variants(points: list[Point]) -> None:
    """A line per configuration: microseconds and percent of the floor, per linear."""
    groups: dict[tuple[str, int], dict[GemmConfig, list[Point]]] = {}
    for point in points:
        if point.config is not None:
            groups.setdefault((point.kind, point.rows), {}).setdefault(point.config, []).append(point)
    for (kind, bucket), per in groups.items():
        some = next(iter(per.values()))
        print(f"\n{kind} M={bucket}  " + "  ".join(f"{p.linear} floor {p.floor:.1f}" for p in some))
        for config, row in per.items():
            cells = "  ".join(f"{p.microseconds:7.1f} {100 * p.floor / p.microseconds:3.0f}%" for p in row)
            flags = "".join(name[0] for name in ("ahead", "rounded", "overlap") if getattr(config, name))
            numbers = (config.strips, config.blocks, config.stages, config.per_multiprocessor, config.max_registers)
            print(f"  {','.join(str(v) for v in numbers if v is not None) + ' ' + flags:16s} {cells}")


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
