"""How long the plan of a cluster of 64 GPUs takes, footprints given: `python -m benchmarks.placement_cluster`.

Planning is one thread that waits for nothing, so CPU time is what it takes on an idle machine. The least of several
runs is printed: what else runs on the machine only adds to it. The models have the shapes of Llama-3.1-8B, 70B and
405B, made here by hand, so that neither transformers nor torch is part of what is timed. Everything else is: each kind
of group is solved, the nodes are packed, the frontier is drawn up.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Sequence
from time import process_time

from placement.cluster import ClusterPlan, plan_cluster
from placement.footprint import Footprint, Geometry, Module, Role, Tensor
from placement.hardware import Inventory, Node, parse_gpus
from placement.kv import LayerKv
from placement.wishes import Wish

GOAL_S = 2.0
VOCAB, KV_HEADS, HEAD_DIM = 128256, 8, 128
SHAPES = {"8B": (32, 4096, 14336), "70B": (80, 8192, 28672), "405B": (126, 16384, 53248)}
"""Layers, hidden size, inner size."""
ALL, FEW = ("bf16", "int8", "nf4"), ("int8", "nf4")
SCENES: dict[str, tuple[tuple[str, ...], tuple[Wish, ...]]] = {
    "8 nodes alike, one model": (("8xA100-80GB",) * 8, (Wish("huge", "405B", FEW, context=8192),)),
    "two kinds of node, two models": (
        ("8xH100",) * 4 + ("8xL4",) * 4,
        (
            Wish("large", "70B", FEW, context=8192, concurrency=32),
            Wish("small", "8B", ALL, context=8192, concurrency=64, share=3),
        ),
    ),
    "two kinds on each node, three models": (
        ("4xH100,4xL40S",) * 8,
        (
            Wish("large", "70B", FEW, context=8192, concurrency=32),
            Wish("small", "8B", ALL, context=8192, concurrency=64, share=3),
            Wish("quick", "8B", FEW, context=4096, goal="latency"),
        ),
    ),
    "no two nodes alike, two models": (
        (*(f"{count}xH100,{8 - count}xL4" for count in range(1, 8)), "8xRTX-4090"),
        (Wish("large", "70B", FEW, context=8192), Wish("small", "8B", FEW, context=8192, concurrency=64)),
    ),
}


def model(name: str) -> Footprint:
    """Llama-3.1's shapes in bfloat16."""
    layers, hidden, inner = SHAPES[name]
    kv = KV_HEADS * HEAD_DIM
    linears = ((hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden))
    linears += ((inner, hidden), (inner, hidden), (hidden, inner))

    def module(name: str, role: Role, *shapes: tuple[int, ...], linear: bool = False) -> Module:
        tensors = tuple(_tensor(f"{name}.{i}", shape, linear) for i, shape in enumerate(shapes))
        return Module(name, role, tensors, 0 if role == "first" else sum(tensor.elements for tensor in tensors))

    modules = (
        module("embed_tokens", "first", (VOCAB, hidden)),
        *(module(f"layers.{i}", "layer", *linears, linear=True) for i in range(layers)),
        module("lm_head", "last", (VOCAB, hidden)),
    )
    geometry = Geometry(hidden, VOCAB, hidden // HEAD_DIM, 131072, False, (LayerKv(KV_HEADS, HEAD_DIM),) * layers)
    return Footprint(name, "bf16", False, "bfloat16", modules, geometry)


def _tensor(name: str, shape: tuple[int, ...], linear: bool) -> Tensor:
    return Tensor(name, name, shape, 2, linear, 2 * shape[0] * shape[1])


def footprints() -> dict[tuple[str, str], Footprint]:
    """Every model at every quantisation."""
    whole = {name: model(name) for name in SHAPES}
    return {(name, q): each if q == "bf16" else each.at(q) for name, each in whole.items() for q in ALL}


def run(scene: str, weighed: dict[tuple[str, str], Footprint]) -> tuple[float, ClusterPlan]:
    """CPU seconds that one plan took, and the plan."""
    nodes, wishes = SCENES[scene]
    inventory = Inventory(tuple(Node(f"n{i}", parse_gpus(text)) for i, text in enumerate(nodes)))
    start = process_time()
    plan = plan_cluster(inventory, wishes, lambda wish, quantization: weighed[wish.source, quantization])
    return process_time() - start, plan


def report(repeats: int) -> None:
    """Print one line per cluster."""
    weighed = footprints()
    for scene in SCENES:
        runs = [run(scene, weighed) for _ in range(repeats)]
        seconds, plan = min(took for took, _ in runs), runs[0][1]
        gpus, verdict = len(plan.inventory.gpus), "met" if seconds < GOAL_S else "MISSED"
        replicas = sum(pool.replicas for pool in plan.chosen.pools)
        what = f"{replicas} replicas, {len(plan.frontier)} rows, exact: {'yes' if plan.chosen.exact else 'no'}"
        print(f"cluster  {gpus} GPUs, {scene:<37}{seconds:6.2f} s  (goal: under {GOAL_S:.0f} s, {verdict})  {what}")


def main(argv: Sequence[str] | None = None) -> None:
    """Print the machine, then the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="plans per line; the least is printed (default 3)")
    repeats = parser.parse_args(argv).repeats
    print(f"Python {platform.python_version()}, {platform.machine()}; CPU time, least of {repeats}")
    report(repeats)


if __name__ == "__main__":
    main()
