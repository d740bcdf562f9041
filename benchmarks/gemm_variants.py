"""Configurations of Triton's kernels, each checked and timed: what the table of a GPU is made from."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import replace
from multiprocessing import get_context

import torch

from benchmarks.gemm_report import SHAPES, Point
from benchmarks.products import BOUND, exact, floor_us, random_weight, relative_error, rotate
from deployments.engine.kernels.config import HEURISTIC, Entry, GemmConfig, Kind, Table
from deployments.engine.kernels.timing import graph_time, over
from deployments.engine.kernels.tune import CANDIDATES


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
