"""A cluster plan in the forms that others read: a table, JSON, and the `args` and resources of `serve_config.yaml`."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import yaml

from placement.cluster import ClusterPlan, Host, Layout, Pool, group_name
from placement.export import PlanDocument
from placement.hardware import Gpu, Inventory
from placement.reserve import CONTEXT

SCHEMA = "headroom.cluster/1"
"""Its number is raised when the JSON changes shape."""


def pool_names(layout: Layout) -> list[str]:
    """A name per pool, in order, each used once per model: `nf4-2xh200`."""
    names: list[str] = []
    for pool in layout.pools:
        name = re.sub(r"[^a-z0-9]+", "-", f"{pool.quantization}-{group_name(pool.gpus)}".lower()).strip("-")
        taken = {other for other, p in zip(names, layout.pools, strict=False) if p.wish == pool.wish}
        number = next(n for n in range(1, len(taken) + 2) if (name if n == 1 else f"{name}-{n}") not in taken)
        names.append(name if number == 1 else f"{name}-{number}")
    return names


def serve_args(inventory: Inventory, layout: Layout, *, pin_nodes: bool = False) -> dict[str, Any]:
    """The `args` of the Serve application: the models with their pools.

    A pool asks Ray for the kind of its GPUs by `accelerator_type`. Where that can't tell them from others in the
    inventory, or with `pin_nodes`, it asks for a custom resource of its own, which `node_resources` gives to the nodes
    that it was planned for.
    """
    models: dict[str, dict[str, Any]] = {}
    for pool, name in zip(layout.pools, pool_names(layout), strict=True):
        wish = pool.wish
        model = models.setdefault(wish.name, {"name": wish.name, "source": wish.source, "pools": []})
        model["pools"].append(_pool_settings(pool, name) | _pins(inventory, pool, name, pin_nodes=pin_nodes))
    return {"models": list(models.values())}


def node_resources(inventory: Inventory, layout: Layout, *, pin_nodes: bool = False) -> dict[str, dict[str, int]]:
    """Per node the custom resources that its Ray must be started with (`ray start --resources`); often none."""
    found: dict[str, dict[str, int]] = {node.name: {} for node in inventory.nodes}
    for pool, name in zip(layout.pools, pool_names(layout), strict=True):
        for resource in _pins(inventory, pool, name, pin_nodes=pin_nodes).get("resources", ()):
            for host in pool.hosts:
                found[host.node][resource] = found[host.node].get(resource, 0) + 1
    return {node: resources for node, resources in found.items() if resources}


def serve_config(inventory: Inventory, layout: Layout, *, pin_nodes: bool = False) -> str:
    """The text of a `serve_config.yaml`, with what can't be said in it as comments."""
    application = {
        "name": "headroom",
        "route_prefix": "/",
        "import_path": "deployments.app:build",
        "args": serve_args(inventory, layout, pin_nodes=pin_nodes),
    }
    lines = [f"# {line}" for line in notes(inventory, layout, pin_nodes=pin_nodes)]
    text = yaml.safe_dump({"applications": [application]}, sort_keys=False, width=120)
    return "\n".join((*lines, text))


def notes(inventory: Inventory, layout: Layout, *, pin_nodes: bool = False) -> list[str]:
    """What has to be done or known beside the config, a line each."""
    found = []
    for node, resources in node_resources(inventory, layout, pin_nodes=pin_nodes).items():
        found.append(f"node {node}: ray start --resources='{json.dumps(resources)}'")
    for name in mixed_nodes(inventory, layout):
        found.append(
            f"node {name} mixes kinds of GPU, and Ray does not choose among them: run one Ray node per kind there, "
            "with CUDA_VISIBLE_DEVICES"
        )
    return found


def mixed_nodes(inventory: Inventory, layout: Layout) -> list[str]:
    """Nodes on which a replica may be handed GPUs of another kind than planned: several kinds, in several groups."""
    used = [host.node for pool in layout.pools for host in pool.hosts] + [host.node for host in layout.idle]
    return [n.name for n in inventory.nodes if len({_anonymous(g) for g in n.gpus}) > 1 and used.count(n.name) > 1]


def _pool_settings(pool: Pool, name: str) -> dict[str, Any]:
    wish = pool.wish
    settings: dict[str, Any] = {
        "name": name,
        "replicas": pool.replicas,
        "quantization": pool.quantization,
        "device": "cuda",
        "stages": len(pool.gpus),
        "block_size": wish.block_size,
        "max_context": pool.plan.max_context,
        "max_sequences": wish.max_sequences,
        "max_batch_tokens": wish.max_batch_tokens,
    }
    if wish.doubles(pool.quantization):
        settings["double_quant"] = True
    if wish.goal != "throughput":
        settings["goal"] = wish.goal
    if any(gpu.usable_bytes < gpu.memory_bytes for gpu in pool.gpus):
        settings["max_memory"] = _caps(pool)
    return settings


def _caps(pool: Pool) -> dict[int, int]:
    """What the plan was allowed to use of each GPU, for GPUs that others use as well."""
    return {
        stage.device: stage.budget_bytes - sum(term.bytes for term in stage.reserve if term.name == CONTEXT)
        for stage in pool.plan.stages
    }


def _pins(inventory: Inventory, pool: Pool, name: str, *, pin_nodes: bool) -> dict[str, Any]:
    kinds = {_anonymous(gpu) for gpu in inventory.gpus}
    types = {gpu.accelerator_type for gpu in pool.gpus}
    asked = types.pop() if len(types) == 1 else None
    alike = [kind for kind in kinds if asked and kind.accelerator_type == asked]
    pins: dict[str, Any] = {"accelerator_type": asked} if asked else {}
    if pin_nodes or (len(alike) != 1 and len(kinds) > 1):
        pins["resources"] = {re.sub(r"[^A-Za-z0-9-]+", "-", f"headroom-{pool.wish.name}-{name}"): 1}
    return pins


def _anonymous(gpu: Gpu) -> Gpu:
    """A kind of GPU, whatever is free of it."""
    return replace(gpu, free_bytes=None)


def cluster_table(plan: ClusterPlan) -> str:
    """The frontier for a terminal, and where the replicas of the chosen row run."""
    return "\n".join((_frontier(plan), "", _where(plan.chosen), *_idle(plan.chosen.idle)))


def _frontier(plan: ClusterPlan) -> str:
    rows = [["row", "goal", "context", "tokens/s", "alone", "KV tokens", "replicas"]]
    for number, layout in enumerate(plan.frontier, start=1):
        contexts = "/".join(f"{context:,}" for context in layout.contexts)
        figures = (f"{layout.decode:,}", f"{layout.single:,}", f"{layout.kv_tokens:,}")
        mark = "*" if layout is plan.chosen else " "
        rows.append([f"{mark}{number}", layout.aim, contexts, *figures, _summary(layout)])
    exact = "" if plan.chosen.exact else "; the chosen row is the best of a wide search"
    note = f"tokens/s are estimates, for traffic in the wished shares at full load{exact}"
    return "\n".join((*_aligned(rows, "<<>>>><"), note))


def _summary(layout: Layout) -> str:
    several = len({pool.wish.name for pool in layout.pools}) > 1
    parts = []
    for pool in layout.pools:
        name = f"{pool.wish.name} " if several else ""
        parts.append(f"{name}{pool.replicas} x ({group_name(pool.gpus)} {pool.quantization})")
    return ", ".join(parts)


def _where(layout: Layout) -> str:
    rows = [["model", "pool", "node", "replicas", "GPUs", "context", "KV tokens", "tokens/s", "alone"]]
    for pool, name in zip(layout.pools, pool_names(layout), strict=True):
        each = (pool.plan.max_context, pool.plan.capacity_tokens, pool.speed.decode, pool.speed.single)
        for node in dict.fromkeys(host.node for host in pool.hosts):
            here = [host for host in pool.hosts if host.node == node]
            devices = " ".join("+".join(map(str, host.devices)) for host in here)
            rows.append([pool.wish.name, name, node, str(len(here)), devices, *(f"{figure:,}" for figure in each)])
    return "\n".join((*_aligned(rows, "<<<><>>>>"), "context, KV tokens and tokens/s are those of each replica"))


def _idle(idle: Sequence[Host]) -> list[str]:
    return [f"idle: node {host.node}, GPUs {' '.join(map(str, host.devices))}" for host in idle]


def _aligned(rows: list[list[str]], aligns: str) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{c:{a}{w}}" for c, a, w in zip(row, aligns, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return lines


def cluster_json(plan: ClusterPlan, *, pin_nodes: bool = False) -> str:
    """The plan as JSON with its schema's name and version: the frontier, and all about the chosen row."""
    chosen, inventory = plan.chosen, plan.inventory
    document = {
        "schema": SCHEMA,
        "chosen": next(i for i, row in enumerate(plan.frontier) if row is chosen),
        "frontier": [_row(row) for row in plan.frontier],
        "plans": _plans(chosen),
        "args": serve_args(inventory, chosen, pin_nodes=pin_nodes),
        "node_resources": node_resources(inventory, chosen, pin_nodes=pin_nodes),
        "notes": notes(inventory, chosen, pin_nodes=pin_nodes),
    }
    return json.dumps(document, indent=2)


def _plans(layout: Layout) -> dict[str, Any]:
    """Per model and pool the plan of each replica, as `placement.export` writes it."""
    return {
        f"{pool.wish.name}/{name}": PlanDocument.of(pool.plan).model_dump(mode="json", by_alias=True)
        for pool, name in zip(layout.pools, pool_names(layout), strict=True)
    }


def _row(layout: Layout) -> dict[str, Any]:
    return {
        "goal": layout.aim,
        "contexts": layout.contexts,
        "decode_tokens_per_s": layout.decode,
        "single_tokens_per_s": layout.single,
        "kv_tokens": layout.kv_tokens,
        "exact": layout.exact,
        "pools": [
            {
                "model": pool.wish.name,
                "name": name,
                "quantization": pool.quantization,
                "gpus": [gpu.name for gpu in pool.gpus],
                "replicas": pool.replicas,
                "hosts": [{"node": host.node, "devices": host.devices} for host in pool.hosts],
            }
            for pool, name in zip(layout.pools, pool_names(layout), strict=True)
        ],
        "idle": [{"node": host.node, "devices": host.devices} for host in layout.idle],
    }
