"""Microseconds of a product on a GPU, as it is used.

In a CUDA graph, over all weights of one shape in turn, so that the cache holds none of them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from deployments.engine.kernels.config import BUCKETS, GemmConfig
from deployments.engine.kernels.cut import Cut
from deployments.engine.kernels.slab import Slab
from deployments.engine.kernels.weights import Weight4, Weight8

Weight = Weight4 | Weight8


def time_product(weights: Sequence[Weight], config: GemmConfig | Cut | Slab | None, rows: int) -> float:
    """Of a product with so many rows on the weights' GPU, in bfloat16; None: the weight is dequantised for it."""
    device = weights[0].packed.device
    x = torch.randn(rows, weights[0].k, device=device, dtype=torch.bfloat16)
    if config is None:
        call = partial(_whole, x)
    elif isinstance(config, Cut | Slab):
        call = partial(cut_product, x, config)
    else:
        call = partial(_small, x, config, min(rows, BUCKETS[-1]))
    with torch.cuda.device(device):
        return graph_time(over(weights, call))


def cut_product(x: Tensor, cut: Cut | Slab, weight: Weight) -> Tensor:
    """The product by the CUDA kernel that the cut is for."""
    from deployments.engine.kernels.skinny import skinny_product
    from deployments.engine.kernels.wide import wide_product

    return skinny_product(x, weight, None, cut) if isinstance(cut, Cut) else wide_product(x, weight, None, cut)


def _small(x: Tensor, config: GemmConfig, bucket: int, weight: Weight) -> Tensor:
    from deployments.engine.kernels.launch import small_product

    return small_product(x, weight, None, config, bucket=bucket)


def _whole(x: Tensor, weight: Weight) -> Tensor:
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
