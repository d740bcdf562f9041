"""What a plan becomes: device_map, caps, Serve options, JSON, a table."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import jsonschema
import pytest

from placement import export
from placement.errors import PlacementError
from placement.hardware import Gpu, virtual_cpu_devices
from placement.plan import Plan, Stage, solve
from placement.reserve import Term
from placement.schema import plan_schema
from tests.unit.placement.toy import small_sampler, toy_footprint

STAGES = (
    Stage(0, Gpu("a", 2000), (0, 2), ("embed", "layers.0", "layers.1", "rotary"), (), 700,
          (Term("context", 100, "c"), Term("activations", 50, "a")), 10, 2000),
    Stage(2, Gpu("b", 9_000_000), (2, 3), ("layers.2", "norm", "head"), ("rotary",), 500,
          (Term("workspace", 5_000_000, "w"),), 5, 9_000_000),
)  # fmt: skip
PLAN = Plan("toy", "nf4", True, "bfloat16", "float16", 16, 20, 300, STAGES)


def test_device_map_names_every_module_once() -> None:
    on_cuda = {"embed": 0, "layers.0": 0, "layers.1": 0, "rotary": 0, "layers.2": 2, "norm": 2, "head": 2}
    assert export.device_map(PLAN) == on_cuda
    assert export.device_map(PLAN, "cpu") == dict.fromkeys(on_cuda, "cpu")


def test_caps_leave_the_context_out() -> None:
    # 700 + 50 + 21 * 10; 500 + 5,000,000 + 21 * 5.
    assert export.max_memory(PLAN) == {0: 960, 2: 5_000_605}


def test_a_cpu_stage_is_cpu_in_a_device_map_of_gpus() -> None:
    last = replace(STAGES[1], gpu=replace(STAGES[1].gpu, device_type="cpu"))
    mixed = export.device_map(replace(PLAN, stages=(STAGES[0], last)))
    assert (mixed["embed"], mixed["layers.2"], mixed["head"]) == (0, "cpu", "cpu")


def on(*gpus: Gpu) -> Plan:
    """The plan with its stages on other devices, its weights and all else as they were."""
    return replace(PLAN, stages=tuple(replace(s, gpu=g) for s, g in zip(STAGES, gpus, strict=True)))


def test_serve_options_count_gpus_up_to_the_last_in_use() -> None:
    assert export.serve_options(PLAN) == {"ray_actor_options": {"num_gpus": 3}}
    cpu = Gpu("c", 2000, device_type="cpu")
    assert export.serve_options(on(STAGES[0].gpu, cpu)) == {"ray_actor_options": {"num_gpus": 1}}
    assert export.serve_options(on(cpu, cpu)) == {"ray_actor_options": {"num_gpus": 0}}


def test_serve_options_name_the_one_kind_of_gpu() -> None:
    l4, h200 = Gpu.of("NVIDIA L4"), Gpu.of("NVIDIA H200")
    assert export.serve_options(on(l4, l4)) == {"ray_actor_options": {"num_gpus": 3, "accelerator_type": "L4"}}
    # A node has one accelerator type in Ray, so one with both kinds is not found by either.
    assert export.serve_options(on(l4, h200)) == {"ray_actor_options": {"num_gpus": 3}}


def test_json_round_trip() -> None:
    for plan in (PLAN, on(Gpu.of("NVIDIA L4", free_bytes=10**9), Gpu.of("NVIDIA H200"))):
        assert export.from_json(export.to_json(plan)) == plan


def test_json_has_what_loading_and_serving_need() -> None:
    data = json.loads(export.to_json(PLAN))
    assert data["schema"] == "headroom.plan/2"
    assert data["device_map"] == export.device_map(PLAN)
    assert data["max_memory"] == {"0": 960, "2": 5_000_605}
    assert data["serve_options"] == export.serve_options(PLAN)


def test_json_follows_its_schema() -> None:
    checker = jsonschema.Draft202012Validator(json.loads(plan_schema()))
    data = json.loads(export.to_json(PLAN))
    checker.validate(data)
    data["plan"]["stages"][0]["colour"] = "red"
    assert [error.message for error in checker.iter_errors(data)] == [
        "Additional properties are not allowed ('colour' was unexpected)"
    ]


def place(data: Any, path: str) -> tuple[Any, str]:
    """What holds a value in a plan's JSON, and under which key."""
    *parents, key = path.split("/")
    for parent in parents:
        data = data[int(parent) if isinstance(data, list) else parent]
    return data, key


def changed(path: str, value: object) -> str:
    """The plan's JSON with one value changed or added."""
    data = json.loads(export.to_json(PLAN))
    inner, key = place(data, path)
    inner[key] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a plan's JSON: Expecting property name"),
        ("[]", 'there is no "schema"'),
        ("{}", 'there is no "schema"'),
        (
            changed("schema", "headroom.plan/1"),
            "has schema 'headroom.plan/1', this reader knows 'headroom.plan/2'; write it again with `headroom plan ",
        ),
        ('{"schema": "headroom.plan/2", "plan": {}}', "plan.model: "),
        (changed("plan/stages/0/colour", "red"), "plan.stages.0.colour: Unexpected keyword"),
        (changed("plan/stages/1/weight_bytes", "500"), "plan.stages.1.weight_bytes: Input should be a valid integer"),
        (changed("plan/stages/1/gpu/memory_bytes", 0), "memory and speed must be positive"),
        (changed("device_map/head", 1), "do not follow from the plan"),
        (changed("max_memory/0", 961), "do not follow from the plan"),
        (changed("serve_options/ray_actor_options", {"num_gpus": 1}), "do not follow from the plan"),
    ],
)
def test_json_of_another_shape_is_refused(text: str, message: str) -> None:
    with pytest.raises(PlacementError, match=re.escape(message)):
        export.from_json(text)


@pytest.mark.parametrize("path", ["attention", "head", "stages/0/weights", "stages/0/gpu/device_type"])
def test_a_field_that_is_missing_is_not_filled_in(path: str) -> None:
    data = json.loads(export.to_json(PLAN))
    inner, key = place(data["plan"], path)
    del inner[key]
    checker = jsonschema.Draft202012Validator(json.loads(plan_schema()))
    assert [error.message for error in checker.iter_errors(data)] == [f"'{key}' is a required property"]
    with pytest.raises(PlacementError, match="a field is missing"):
        export.from_json(json.dumps(data))


def test_table() -> None:
    assert export.table(PLAN).splitlines() == [
        "toy: nf4 with double quantisation, computes in bfloat16, KV cache in float16",
        "device  layers  weights  KV cache  context  activations  workspace     free   budget",
        "------  ------  -------  --------  -------  -----------  ---------  -------  -------",
        "0: a    0-1       700 B     210 B    100 B         50 B        0 B    940 B  2.00 kB",
        "2: b    2-2       500 B     105 B      0 B          0 B    5.00 MB  4.00 MB  9.00 MB",
        "KV capacity 320 tokens (20 blocks of 16); longest sequence 300 tokens",
    ]


def test_explanation_says_what_every_byte_is_for() -> None:
    weights = (Term("embedding", 300, "embed"), Term("layers", 400, "2 layers"))
    text = export.explain(replace(PLAN, stages=(replace(STAGES[0], weights=weights), STAGES[1])))
    assert text.splitlines()[:7] == [
        "device 0 (a), layers 0 to 1:",
        "  embedding 300 bytes: embed",
        "  layers 400 bytes: 2 layers",
        "  KV cache 210 bytes: 20 blocks and 1 scratch block of 10",
        "  context 100 bytes: c",
        "  activations 50 bytes: a",
        "  free 940 of 2,000 bytes",
    ]
    assert "  workspace 5,000,000 bytes: w" in text


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("devices", [1, 2])
def test_a_stages_weights_add_up(devices: int, tied: bool) -> None:
    weighed = toy_footprint([10_000] * 4, embedding=30_000, head=500, tied=tied)
    gpus = virtual_cpu_devices(("250kB",) * devices)
    with small_sampler():
        plan = solve(weighed, gpus, block_size=4, max_batch_tokens=8, max_sequences=4, max_context=32)
    assert len(plan.stages) == devices
    for stage in plan.stages:
        assert sum(term.bytes for term in stage.weights) == stage.weight_bytes
    first = {term.name: term.bytes for term in plan.stages[0].weights}
    assert (first["embedding"], first["layers"]) == (30_000, 40_000 // devices)
    head = {(False, 1): 501, (False, 2): 501, (True, 1): 1, (True, 2): 30_001}[tied, devices]
    assert next(term.bytes for term in plan.stages[-1].weights if term.name == "head") == head
