"""A plan in the forms that others read: accelerate's device_map, memory caps, Serve options, JSON and a table."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from placement.errors import PlacementError
from placement.hardware import DeviceType, Gpu, format_bytes
from placement.plan import Plan, Stage
from placement.reserve import CONTEXT, Term

JSON_VERSION = 1
"""Raised when the JSON changes shape; a reader refuses one it does not know."""


def device_map(plan: Plan, device_type: DeviceType = "cuda") -> dict[str, int | str]:
    """Module name -> device, as `from_pretrained(device_map=...)` takes it: indices on CUDA, "cpu" otherwise."""
    return {name: stage.device if device_type == "cuda" else "cpu" for stage in plan.stages for name in stage.modules}


def max_memory(plan: Plan) -> dict[int, int]:
    """The least caps in bytes, per device, under which the plan still fits: everything but the CUDA context.

    In the sense of the `max_memory` setting. Beside an explicit device_map, `from_pretrained` ignores its own.
    """
    return {
        stage.device: stage.weight_bytes
        + sum(term.bytes for term in stage.reserve if term.name != CONTEXT)
        + plan.kv_bytes(stage)
        for stage in plan.stages
    }


def serve_options(plan: Plan) -> dict[str, Any]:
    """Ray Serve's deployment options for one replica: one actor that owns all the plan's GPUs, none on the CPU."""
    gpus = sum(stage.gpu.device_type == "cuda" for stage in plan.stages)
    return {"ray_actor_options": {"num_gpus": gpus}}


def to_json(plan: Plan) -> str:
    """The plan as JSON, indented, with its schema's version."""
    return json.dumps({"version": JSON_VERSION, "plan": asdict(plan)}, indent=2)


def from_json(text: str) -> Plan:
    """The plan that `to_json` wrote.

    Raises:
        PlacementError: not JSON, another version, or a missing or unknown field.
    """
    try:
        data = json.loads(text)
        if data["version"] != JSON_VERSION:
            raise PlacementError(f"plan JSON has version {data['version']}, this reader knows {JSON_VERSION}")
        plan = data["plan"]
        return Plan(**{**plan, "stages": tuple(_stage(stage) for stage in plan["stages"])})
    except (ValueError, KeyError, TypeError) as error:
        raise PlacementError(f"this is not a plan's JSON: {error!r}") from None


def _stage(data: dict[str, Any]) -> Stage:
    first, past = data["layers"]
    nested = {
        "gpu": Gpu(**data["gpu"]),
        "layers": (first, past),
        "modules": tuple(data["modules"]),
        "copies": tuple(data["copies"]),
        "reserve": tuple(Term(**term) for term in data["reserve"]),
        "weights": tuple(Term(**term) for term in data["weights"]),
    }
    return Stage(**{**data, **nested})


def table(plan: Plan) -> str:
    """The plan for a terminal: one line per stage, then the KV capacity."""
    names = list(dict.fromkeys(term.name for stage in plan.stages for term in stage.reserve))
    rows = [["device", "layers", "weights", "KV cache", *names, "free", "budget"]]
    for stage in plan.stages:
        held = {term.name: term.bytes for term in stage.reserve}
        sizes = [stage.weight_bytes, plan.kv_bytes(stage), *(held.get(name, 0) for name in names)]
        sizes += [plan.unused_bytes(stage), stage.budget_bytes]
        where = f"{stage.device}: {stage.gpu.name}"
        rows.append([where, f"{stage.layers[0]}-{stage.layers[1] - 1}", *map(format_bytes, sizes)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligns = "<<" + ">" * (len(widths) - 2)
    lines = ["  ".join(f"{c:{a}{w}}" for c, a, w in zip(row, aligns, widths, strict=True)) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join((_title(plan), *(line.rstrip() for line in lines), _capacity(plan)))


def explain(plan: Plan) -> str:
    """Every reserve of every stage with its reason, one per line."""
    lines = []
    for stage in plan.stages:
        lines.append(f"device {stage.device} ({stage.gpu.name}), layers {stage.layers[0]} to {stage.layers[1] - 1}:")
        lines.append(f"  weights {stage.weight_bytes:,} bytes: {_contents(stage)}")
        lines.append(
            f"  KV cache {plan.kv_bytes(stage):,} bytes: {plan.num_blocks:,} blocks and 1 scratch block "
            f"of {stage.kv_block_bytes:,}"
        )
        lines += [f"  {term.name} {term.bytes:,} bytes: {term.why}" for term in stage.reserve]
        lines.append(f"  free {plan.unused_bytes(stage):,} of {stage.budget_bytes:,} bytes")
    return "\n".join(lines)


def _contents(stage: Stage) -> str:
    others = [name for name in stage.modules if not name.rpartition(".")[2].isdigit()]
    layers = f"{stage.layers[1] - stage.layers[0]} layers"
    copies = [f"a copy of {name}" for name in stage.copies]
    return ", ".join((layers, *others, *copies))


def _title(plan: Plan) -> str:
    quantization = plan.quantization + (" with double quantisation" if plan.double_quant else "")
    return f"{plan.model}: {quantization}, computes in {plan.dtype}, KV cache in {plan.kv_dtype}"


def _capacity(plan: Plan) -> str:
    return (
        f"KV capacity {plan.capacity_tokens:,} tokens ({plan.num_blocks:,} blocks of {plan.block_size}); "
        f"longest sequence {plan.max_context:,} tokens"
    )
