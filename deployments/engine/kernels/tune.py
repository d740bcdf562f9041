"""Measure which configuration is fastest for a weight on this GPU, and keep the answers on disk.

The products are timed as they are used: as CUDA graphs, over all weights of one shape in turn, so that the cache holds
none of them. The table goes to a folder of the caller's (`HEADROOM_HOME/kernels`), and is read before the shipped ones.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deployments.engine.kernels.config import (
    BUCKETS,
    GemmConfig,
    Kind,
    Table,
    dump_table,
    file_name,
    table_for,
    use_folder,
)
from deployments.engine.kernels.modules import QuantLinear4, QuantLinear8
from deployments.engine.kernels.weights import Weight4, Weight8

log = logging.getLogger(__name__)

CANDIDATES: dict[tuple[Kind, int], tuple[GemmConfig, ...]] = {
    ("4bit", 16): (
        GemmConfig(8, 4, 3, 2),
        GemmConfig(8, 4, 3, 2, 64),
        GemmConfig(4, 4, 5, 2),
        GemmConfig(16, 2, 4, 2, 64),
        GemmConfig(8, 2, 11, 2, 80, ahead=True),
        GemmConfig(8, 4, 3, 2, overlap=True),
        GemmConfig(8, 4, 3, 2, rounded=True),
        GemmConfig(8, 2, 5, 2, rounded=True),
        GemmConfig(4, 4, 5, 2, rounded=True),
        GemmConfig(16, 4, 3, 1, rounded=True),
        GemmConfig(16, 2, 4, 2, 64, rounded=True),
        GemmConfig(8, 2, 11, 2, ahead=True, rounded=True),
        GemmConfig(16, 2, 9, 2, 64, ahead=True, rounded=True),
        GemmConfig(8, 4, 3, 2, rounded=True, overlap=True),
    ),
    ("4bit", 32): (
        GemmConfig(8, 2, 4, 2),
        GemmConfig(8, 2, 4, 2, rounded=True),
        GemmConfig(8, 2, 6, 2, 128, ahead=True, rounded=True),
        GemmConfig(16, 2, 4, 1, rounded=True),
        GemmConfig(8, 2, 4, 2, rounded=True, overlap=True),
    ),
    ("4bit", 64): (
        GemmConfig(8, 2, 3, 2, 128),
        GemmConfig(8, 2, 3, 2, 128, rounded=True),
        GemmConfig(8, 1, 5, 2, 128, rounded=True),
        GemmConfig(8, 2, 4, 2, 128, ahead=True, rounded=True),
        GemmConfig(16, 2, 3, 1, rounded=True),
        GemmConfig(8, 2, 3, 2, 128, rounded=True, overlap=True),
    ),
    ("4bit", 128): (
        GemmConfig(8, 1, 5, 1),
        GemmConfig(8, 1, 4, 2, 128, rounded=True),
        GemmConfig(8, 2, 3, 1, rounded=True),
        GemmConfig(16, 2, 3, 1, rounded=True),
        GemmConfig(16, 1, 4, 1, rounded=True),
    ),
    ("8bit", 16): (
        GemmConfig(8, 2, 3, 2),
        GemmConfig(8, 2, 3, 3, 80),
        GemmConfig(8, 1, 5, 3),
        GemmConfig(4, 4, 3, 3),
        GemmConfig(4, 2, 5, 4),
        GemmConfig(4, 2, 4, 5, 80),
        GemmConfig(16, 2, 3, 1),
        GemmConfig(4, 4, 3, 3, overlap=True),
    ),
    ("8bit", 32): (
        GemmConfig(8, 2, 3, 2),
        GemmConfig(4, 2, 4, 3),
        GemmConfig(4, 2, 3, 4, 112),
        GemmConfig(4, 2, 4, 3, overlap=True),
    ),
    ("8bit", 64): (
        GemmConfig(8, 2, 3, 2, 128),
        GemmConfig(8, 1, 5, 2, 128),
        GemmConfig(8, 2, 5, 1),
        GemmConfig(4, 2, 4, 2),
        GemmConfig(8, 1, 5, 2, 128, overlap=True),
    ),
    ("8bit", 128): (
        GemmConfig(8, 2, 3, 1),
        GemmConfig(8, 1, 5, 1),
        GemmConfig(8, 1, 4, 2, 128),
        GemmConfig(16, 2, 3, 1),
    ),
}
"""What is tried for each bucket of rows. Of the 4-bit ones, each needs over 48 KiB of dynamic shared memory beside the
table of pairs: Triton raises the driver's limit of 48 KiB in all only for such."""
CROSSOVER_ROWS = (32, 64, 128, 256)
"""Where dequantising is compared with the small-batch kernel."""


def tune(model: nn.Module, folder: Path) -> Table:
    """Tune the products of `model`'s quantised linears and use the result from now on.

    A table of this GPU in `folder` is completed with the shapes that it lacks; with none lacking, nothing is measured.
    """
    gpu = torch.cuda.get_device_name()
    use_folder(folder)
    table = table_for(gpu)
    groups: dict[tuple[Kind, int, int], list[Weight4 | Weight8]] = {}
    for module in model.modules():
        if isinstance(module, QuantLinear4 | QuantLinear8) and module.quantised.tiled:
            weight = module.quantised
            kind: Kind = "4bit" if isinstance(weight, Weight4) else "8bit"
            groups.setdefault((kind, weight.n, weight.k), []).append(weight)
    unknown = [shape for shape in groups if not table.knows(*shape)]
    for shape in unknown:
        table = table.with_shape(*shape, *tune_shape(shape[0], groups[shape]))
    if unknown:
        write_table(table, folder / file_name(gpu))
        use_folder(folder)
    return table


def tune_shape(kind: Kind, weights: Sequence[Weight4 | Weight8]) -> tuple[dict[int, GemmConfig], int]:
    """The fastest configuration of each bucket, and the most rows for which the kernel is not slower than
    dequantising. Configurations that can't be built or launched are logged and passed over.

    Raises:
        RuntimeError: none of a bucket's configurations runs on this GPU.
    """
    device, k = weights[0].packed.device, weights[0].k
    best: dict[int, GemmConfig] = {}
    for bucket in BUCKETS:
        x = torch.randn(bucket, k, device=device, dtype=torch.bfloat16)
        times: dict[GemmConfig, float] = {}
        for config in CANDIDATES[kind, bucket]:
            try:
                times[config] = graph_time(over(weights, partial(_small, x, config, bucket)))
            except Exception as error:  # noqa: BLE001 - the others may well run
                log.info("%s for %d rows does not run here: %s", config, bucket, error)
        if not times:
            raise RuntimeError(
                f"no {kind} configuration for {bucket} rows runs on {torch.cuda.get_device_name(device)}"
            )
        best[bucket] = min(times, key=times.__getitem__)
    crossover = 0
    for rows in CROSSOVER_ROWS:
        x = torch.randn(rows, k, device=device, dtype=torch.bfloat16)
        bucket = min(rows, BUCKETS[-1])
        small = graph_time(over(weights, partial(_small, x, best[bucket], bucket)))
        if small > graph_time(over(weights, partial(_whole, x))):
            break
        crossover = rows
    return best, crossover


def _small(x: Tensor, config: GemmConfig, bucket: int, weight: Weight4 | Weight8) -> Tensor:
    from deployments.engine.kernels.launch import small_product

    return small_product(x, weight, None, config, bucket=bucket)


def _whole(x: Tensor, weight: Weight4 | Weight8) -> Tensor:
    from deployments.engine.kernels.launch import dequantised_product

    return dequantised_product(x, weight, None)


def over(weights: Sequence[Any], call: Callable[[Any], Tensor], least: int = 12) -> list[Callable[[], Tensor]]:
    """At least `least` calls, each on the next weight."""
    count = max(least, len(weights))
    return [partial(call, weights[i % len(weights)]) for i in range(count)]


def graph_time(calls: Sequence[Callable[[], Any]], repeats: int = 7) -> float:
    """Microseconds per call, the median over replays of a CUDA graph of all of them."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times: list[float] = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def write_table(table: Table, path: Path) -> None:
    """Written beside and renamed: a reader sees the old table or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(dump_table(table), indent=1) + "\n", encoding="utf-8")
    part.replace(path)
