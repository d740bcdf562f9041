"""A plan in the forms that others read: accelerate's device_map, memory caps, Serve options, JSON and a table.

`placement.sequential` has the caps that transformers itself splits by, `placement.svg` the picture.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from placement.errors import PlacementError
from placement.hardware import DeviceType, format_bytes
from placement.plan import Plan
from placement.reserve import CONTEXT

SCHEMA: Literal["headroom.plan/2"] = "headroom.plan/2"
"""Its number is raised when the JSON changes shape; a reader refuses one it does not know. 2: with `attention`."""
_AGAIN = "write it again with `headroom plan MODEL --json`"


def device_map(plan: Plan, device_type: DeviceType = "cuda") -> dict[str, int | str]:
    """Module name -> device, as `from_pretrained(device_map=...)` takes it: the index of a CUDA device, or "cpu".

    An index counts the devices that the plan was solved for, which are those that the replica's process sees.
    `device_type="cpu"` puts everything on the CPU, where virtual devices are all one.
    """
    return {
        name: stage.device if device_type == stage.gpu.device_type == "cuda" else "cpu"
        for stage in plan.stages
        for name in stage.modules
    }


def max_memory(plan: Plan) -> dict[int, int]:
    """The least caps in bytes, per device, under which the plan still fits: everything but the CUDA context.

    In the sense of a pool's `max_memory` setting. `from_pretrained` understands caps differently, and ignores them
    beside a device_map: see `sequential_max_memory`.
    """
    return {
        stage.device: stage.weight_bytes
        + sum(term.bytes for term in stage.reserve if term.name != CONTEXT)
        + plan.kv_bytes(stage)
        for stage in plan.stages
    }


def serve_options(plan: Plan) -> dict[str, Any]:
    """Ray Serve's deployment options for one replica: one actor, so one node, that owns all the plan's GPUs.

    GPUs are counted up to the last that the plan uses, so that indices mean the same in the actor. Ray asks a node for
    one accelerator type at most, so it is named only where all the GPUs are of one known kind.
    """
    used = [stage for stage in plan.stages if stage.gpu.device_type == "cuda"]
    options: dict[str, Any] = {"num_gpus": max((stage.device + 1 for stage in used), default=0)}
    kinds = {stage.gpu.accelerator_type for stage in used}
    if len(kinds) == 1 and (kind := kinds.pop()):
        options["accelerator_type"] = kind
    return {"ray_actor_options": options}


class PlanDocument(BaseModel):
    """A plan's JSON: the plan, and what follows from it for those who only load or deploy it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    schema_: Literal["headroom.plan/2"] = Field(alias="schema")
    """Name and version of this form."""
    plan: Plan
    """Where each layer goes and what every byte is for. All sizes are bytes."""
    device_map: dict[str, int | Literal["cpu"]]
    """Module name -> CUDA index or "cpu", for `from_pretrained`."""
    max_memory: dict[int, int]
    """Device index -> the least cap in bytes under which the plan still fits."""
    serve_options: dict[str, Any]
    """Ray Serve's deployment options of one replica."""

    @classmethod
    def of(cls, plan: Plan) -> PlanDocument:
        """The document of `plan`."""
        derived = {"max_memory": max_memory(plan), "serve_options": serve_options(plan)}
        return cls.model_validate({"schema": SCHEMA, "plan": plan, "device_map": device_map(plan), **derived})


def to_json(plan: Plan) -> str:
    """The plan as JSON with its schema's name and version; `python -m placement.schema` prints the schema."""
    return PlanDocument.of(plan).model_dump_json(by_alias=True, indent=2)


def from_json(text: str) -> Plan:
    """The plan that `to_json` wrote.

    Raises:
        PlacementError: not JSON, another version, a missing or unknown field, or a device_map, caps or options that
            are not the plan's.
    """
    try:
        data = json.loads(text)
    except ValueError as error:
        raise PlacementError(f"this is not a plan's JSON: {error}") from None
    if not isinstance(data, dict) or "schema" not in data:
        raise PlacementError(f'this is not a plan\'s JSON: there is no "schema": "{SCHEMA}"')
    if data["schema"] != SCHEMA:
        raise PlacementError(f"plan JSON has schema {data['schema']!r}, this reader knows {SCHEMA!r}; {_AGAIN}")
    try:
        document = PlanDocument.model_validate_json(text)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise PlacementError(f"this is not a plan's JSON: {wrong}") from None
    if data != json.loads(to_json(document.plan)):  # pydantic fills in what has a default
        wrong = "a field is missing, or device_map, max_memory or serve_options do not follow from the plan"
        raise PlacementError(f"this is not a plan's JSON: {wrong}; {_AGAIN}")
    return document.plan


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
    return "\n".join((title(plan), *(line.rstrip() for line in lines), capacity(plan)))


def explain(plan: Plan) -> str:
    """Every byte of every stage with its reason, one line per part."""
    lines = []
    for stage in plan.stages:
        lines.append(f"device {stage.device} ({stage.gpu.name}), layers {stage.layers[0]} to {stage.layers[1] - 1}:")
        lines += [f"  {term.name} {term.bytes:,} bytes: {term.why}" for term in stage.weights]
        lines.append(
            f"  KV cache {plan.kv_bytes(stage):,} bytes: {plan.num_blocks:,} blocks and 1 scratch block "
            f"of {stage.kv_block_bytes:,}"
        )
        lines += [f"  {term.name} {term.bytes:,} bytes: {term.why}" for term in stage.reserve]
        lines.append(f"  free {plan.unused_bytes(stage):,} of {stage.budget_bytes:,} bytes")
    return "\n".join((*lines, _longest(plan)))


def _longest(plan: Plan) -> str:
    holds = f"a sequence of {plan.max_context:,} tokens holds {plan.sequence_bytes:,} bytes of KV cache and state"
    if plan.window_aware_bytes == plan.sequence_bytes:
        return holds
    return (
        f"{holds}; a cache that frees blocks behind sliding windows would hold {plan.window_aware_bytes:,}, "
        "but the engine's does not"
    )


def title(plan: Plan) -> str:
    """The model and its numbers' formats, in a line."""
    quantization = plan.quantization + (" with double quantisation" if plan.double_quant else "")
    quantization += ", the head too" if plan.head else ""
    quantization += ", the embedding too" if plan.embeddings else ""
    return f"{plan.model}: {quantization}, computes in {plan.dtype}, KV cache in {plan.kv_dtype}"


def capacity(plan: Plan) -> str:
    """The replica's KV capacity, in a line."""
    return (
        f"KV capacity {plan.capacity_tokens:,} tokens ({plan.num_blocks:,} blocks of {plan.block_size}); "
        f"longest sequence {plan.max_context:,} tokens"
    )
