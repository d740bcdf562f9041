"""Placement: what each GPU will hold, to the byte, before anything loads.

    weighed = footprint(folder, quantization="nf4", dtype="bfloat16")
    plan = solve(weighed, parse_gpus("2x24GiB"), block_size=16, max_batch_tokens=512, max_sequences=256)
    print(table(plan))
    device_map(plan)        # for from_pretrained

Pure Python: torch and transformers are imported only by `skeleton` (when a footprint is asked for) and `probe`; ray is
not imported at all.
"""

from __future__ import annotations

from placement.cluster import ClusterPlan, plan_cluster
from placement.errors import DoesNotFit, PlacementError
from placement.export import device_map, explain, from_json, max_memory, serve_options, table, to_json
from placement.footprint import Footprint, footprint
from placement.hardware import (
    Gpu,
    Inventory,
    Node,
    format_bytes,
    parse_bytes,
    parse_gpus,
    parse_inventory,
    virtual_cpu_devices,
)
from placement.plan import Plan, Stage, solve
from placement.reserve import Term
from placement.sequential import sequential_max_memory
from placement.speed import Speed, estimate
from placement.wishes import Wish, parse_wishes

__all__ = [
    "ClusterPlan",
    "DoesNotFit",
    "Footprint",
    "Gpu",
    "Inventory",
    "Node",
    "PlacementError",
    "Plan",
    "Speed",
    "Stage",
    "Term",
    "Wish",
    "device_map",
    "estimate",
    "explain",
    "footprint",
    "format_bytes",
    "from_json",
    "max_memory",
    "parse_bytes",
    "parse_gpus",
    "parse_inventory",
    "parse_wishes",
    "plan_cluster",
    "sequential_max_memory",
    "serve_options",
    "solve",
    "table",
    "to_json",
    "virtual_cpu_devices",
]
