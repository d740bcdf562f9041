"""How long a plan takes, footprint given: `python -m benchmarks.placement_speed`.

Planning is one thread that waits for nothing, so CPU time is what it takes on an idle machine. The least of several
runs is printed: what else runs on the machine only adds to it.

The model has the shapes of Llama-3.1-405B (126 layers) in NF4, made here by hand, so that neither transformers nor
torch is part of what is timed. The devices are eight GPUs of eight sizes, so that no two are alike to the solver.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable, Sequence
from time import process_time
from typing import Any, get_args

from benchmarks import placement_cluster
from placement.footprint import Footprint, Geometry, Module, Role, Tensor
from placement.hardware import Gpu, format_bytes
from placement.kv import LayerKv
from placement.plan import solve
from placement.solver import Goal

LAYERS, HIDDEN, INNER, VOCAB, HEADS, KV_HEADS, HEAD_DIM = 126, 16384, 53248, 128256, 128, 8, 128
GIB, GOAL_MS = 2**30, 50
SIZES = ((80, 3350), (48, 864), (24, 1008), (141, 4800), (94, 3900), (40, 1555), (32, 1792), (180, 8000))
"""GiB and GB/s of each GPU."""
CONDITIONS: dict[str, Any] = {"block_size": 16, "max_batch_tokens": 512, "max_sequences": 256, "max_context": 8192}


def model() -> Footprint:
    """Llama-3.1-405B's shapes with NF4 linears."""
    kv_rows = KV_HEADS * HEAD_DIM
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (kv_rows, HIDDEN),
        "self_attn.v_proj": (kv_rows, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
    }

    def tensor(name: str, shape: tuple[int, ...], *, linear: bool) -> Tensor:
        elements = shape[0] * (shape[1] if len(shape) > 1 else 1)
        # A block of 64 weights: 32 bytes and a float32 scale; a code of 64 bytes per weight matrix.
        size = elements // 2 + elements // 16 + 64 if linear else 2 * elements
        return Tensor(name, name, shape, 2, linear, size)

    def module(name: str, role: Role, tensors: list[Tensor]) -> Module:
        work = 0 if role == "first" else sum(t.elements for t in tensors if len(t.shape) > 1)
        return Module(name, role, tuple(tensors), work)

    def layer(index: int) -> Module:
        name = f"model.layers.{index}"
        linears = [tensor(f"{name}.{part}.weight", shape, linear=True) for part, shape in shapes.items()]
        norms = [tensor(f"{name}.{part}.weight", (HIDDEN,), linear=False) for part in ("norm_in", "norm_out")]
        return module(name, "layer", linears + norms)

    table = (VOCAB, HIDDEN)
    modules = (
        module("model.embed_tokens", "first", [tensor("model.embed_tokens.weight", table, linear=False)]),
        *(layer(index) for index in range(LAYERS)),
        module("model.norm", "last", [tensor("model.norm.weight", (HIDDEN,), linear=False)]),
        module("lm_head", "last", [tensor("lm_head.weight", table, linear=False)]),
    )
    geometry = Geometry(HIDDEN, VOCAB, HEADS, 131072, False, (LayerKv(KV_HEADS, HEAD_DIM),) * LAYERS)
    return Footprint("405B", "nf4", False, "bfloat16", modules, geometry)


def gpus() -> tuple[Gpu, ...]:
    """Eight GPUs, no two alike."""
    return tuple(Gpu(f"gpu{i}", size * GIB, speed=speed) for i, (size, speed) in enumerate(SIZES))


def timed(run: Callable[[], object], repeats: int) -> float:
    """The least of `repeats` runs, ms."""
    times = []
    for _ in range(repeats):
        start = process_time()
        run()
        times.append(1000 * (process_time() - start))
    return min(times)


def main(argv: Sequence[str] | None = None) -> None:
    """Print one line per goal and order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="plans per line; the least is printed (default 7)")
    repeats = parser.parse_args(argv).repeats
    weighed, devices = model(), gpus()
    print(f"Python {platform.python_version()}, {platform.machine()}; CPU time, least of {repeats}")
    print(f"{LAYERS} layers, {format_bytes(weighed.bytes)} of weights over {len(devices)} unequal GPUs")
    for goal in get_args(Goal):
        plan = solve(weighed, devices, goal=goal, **CONDITIONS)
        ms = timed(lambda goal=goal: solve(weighed, devices, goal=goal, **CONDITIONS), repeats)  # type: ignore[misc]  # a default binds the loop variable
        verdict = "met" if ms < GOAL_MS else "MISSED"
        stages = f"{len(plan.stages)} stages, {plan.capacity_tokens:,} KV tokens"
        print(f"plan  goal={goal:<10}  order=given  {ms:7.1f} ms  (goal: under {GOAL_MS} ms, {verdict})  {stages}")
    plan = solve(weighed, devices, order="best", **CONDITIONS)
    ms = timed(lambda: solve(weighed, devices, order="best", **CONDITIONS), 1)
    print(f"plan  goal=throughput  order=best   {ms:7.1f} ms  {plan.capacity_tokens:,} KV tokens")
    placement_cluster.report(repeats)


if __name__ == "__main__":
    main()
