"""What a plan becomes: device_map, caps, Serve options, JSON, a table."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from placement import export
from placement.errors import PlacementError
from placement.hardware import Gpu
from placement.plan import Plan, Stage
from placement.reserve import Term

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


def test_serve_options_count_gpus() -> None:
    assert export.serve_options(PLAN) == {"ray_actor_options": {"num_gpus": 2}}
    on_cpu = replace(PLAN, stages=tuple(replace(s, gpu=replace(s.gpu, device_type="cpu")) for s in STAGES))
    assert export.serve_options(on_cpu) == {"ray_actor_options": {"num_gpus": 0}}


def test_json_round_trip() -> None:
    text = export.to_json(PLAN)
    assert json.loads(text)["version"] == export.JSON_VERSION
    assert export.from_json(text) == PLAN


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a plan"),
        ("[]", "not a plan"),
        ("{}", "not a plan"),
        ('{"version": 2, "plan": {}}', "version 2, this reader knows 1"),
        ('{"version": 1, "plan": {"stages": [], "colour": "red"}}', "colour"),
    ],
)
def test_json_of_another_shape_is_refused(text: str, message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        export.from_json(text)


def test_table() -> None:
    assert export.table(PLAN).splitlines() == [
        "toy: nf4 with double quantisation, computes in bfloat16, KV cache in float16",
        "device  layers  weights  KV cache  context  activations  workspace     free   budget",
        "------  ------  -------  --------  -------  -----------  ---------  -------  -------",
        "0: a    0-1       700 B     210 B    100 B         50 B        0 B    940 B  2.00 kB",
        "2: b    2-2       500 B     105 B      0 B          0 B    5.00 MB  4.00 MB  9.00 MB",
        "KV capacity 320 tokens (20 blocks of 16); longest sequence 300 tokens",
    ]


def test_explanation_says_every_term() -> None:
    text = export.explain(PLAN)
    for part in ("context 100 bytes: c", "workspace 5,000,000 bytes: w", "a copy of rotary", "1 layers, norm, head"):
        assert part in text
