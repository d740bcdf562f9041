"""Caps for transformers' sequential device_map on toy models: one byte per element, so sums fit in a comment."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import pytest

from placement.errors import PlacementError
from placement.footprint import Footprint
from placement.hardware import Gpu
from placement.plan import Plan, Stage
from placement.sequential import sequential_max_memory
from tests.unit.placement.toy import toy_footprint

ORDER = ("embed", "layers.0", "layers.1", "layers.2", "layers.3", "norm", "rotary", "head")


def model(*sizes: int, order: Sequence[str] = ORDER, head: int = 50, tied: bool = False) -> Footprint:
    """Layers of these sizes, an embedding of 100, a norm of 1, rotary tables of 2 and a head."""
    weighed = toy_footprint(sizes, head=head, tied=tied)
    return replace(weighed, modules=tuple(replace(m, order=order.index(m.name)) for m in weighed.modules))


def plan(weighed: Footprint, *ends: int, devices: Sequence[int] = (0, 1, 2, 3), device_type: str = "cuda") -> Plan:
    """A plan with stages that end before these layers."""
    stages = []
    for i, (start, end) in enumerate(zip((0, *ends), ends, strict=False)):
        names = [f"layers.{layer}" for layer in range(start, end)]
        names += ["embed", "rotary"] if start == 0 else []
        names += ["norm", "head"] if end == len(weighed.layers) else []
        gpu = Gpu("gpu", 10**6, device_type=device_type)  # type: ignore[arg-type]  # "cpu" or "cuda"
        stages.append(Stage(devices[i], gpu, (start, end), tuple(names), (), 0, (), 1, 10**6))
    return Plan("toy", weighed.quantization, False, "float16", "float16", 4, 1, 4, tuple(stages))


def test_a_cap_is_half_a_layer_above_what_a_device_holds() -> None:
    weighed = model(40, 40, 40, 40)
    # Device 0: 100 + 40 + 40, and the head of 50, the largest still to come; a layer more from 40 on: 230 to 269.
    # Device 1: 40 to 79. Device 2: 40 + 1 + 2 + 50, and a quarter of the largest twice: half a head.
    assert sequential_max_memory(plan(weighed, 2, 3, 4), weighed) == {0: 250, 1: 60, 2: 93 + 25}


def test_bitsandbytes_gets_nine_tenths_and_counts_half_a_byte() -> None:
    layers = model(400, 400, 400, 400)
    modules = [
        replace(m, tensors=tuple(replace(t, linear=m.role == "layer") for t in m.tensors)) for m in layers.modules
    ]
    weighed = replace(layers, quantization="nf4", modules=tuple(modules))
    # A layer is 200. Device 0: (100 + 200 + 200) / 0.9 to (100 + 400 + 200) / 0.9: 556 to 777.
    # Device 1: (3 * 200 + 53) / 0.9 = 726, and a quarter of 200 twice.
    assert sequential_max_memory(plan(weighed, 1, 4), weighed) == {0: 667, 1: 726 + 100}


def test_keys_are_the_devices_in_use() -> None:
    weighed = model(40, 40, 40, 40)
    caps = sequential_max_memory(plan(weighed, 2, 4, devices=(1, 3)), weighed)
    assert list(caps) == [1, 3]


@pytest.mark.parametrize(
    ("weighed", "wanted", "reason"),
    [
        (model(9, 9, 9, 9, tied=True), {}, "head beside embed, to which it is tied"),
        (replace(model(9, 9, 9, 9), head=True), {}, "quantised head, which transformers does not load so"),
        (model(9, 9, 9, 9), {"devices": (1, 0)}, "ascending order, and the stages run on 1, 0"),
        (model(9, 9, 9, 9), {"device_type": "cpu"}, "one CPU"),
        (
            model(
                9, 9, 9, 9, order=("embed", "norm", "layers.0", "layers.1", "layers.2", "layers.3", "rotary", "head")
            ),
            {},
            "registers norm before layers.0, which runs on an earlier stage",
        ),
    ],
)
def test_what_sequential_cannot_reproduce(weighed: Footprint, wanted: dict[str, object], reason: str) -> None:
    with pytest.raises(PlacementError, match=re.escape(reason)):
        sequential_max_memory(plan(weighed, 2, 4, **wanted), weighed)  # type: ignore[arg-type]  # wishes by name


def test_what_must_be_left_free_may_be_the_next_layer_itself() -> None:
    # To take layer 2, device 0 has room for layer 3 left; and nothing after layer 3 keeps that from being used.
    weighed = model(9, 9, 9, 9)
    assert sequential_max_memory(plan(weighed, 3, 4), weighed)
    bare = toy_footprint([9, 9, 9, 9], head=0, norm=0, shared=0)
    ordered = replace(bare, modules=tuple(replace(m, order=ORDER.index(m.name)) for m in bare.modules))
    with pytest.raises(PlacementError, match=re.escape("a cap of device 0 that takes layers.2 takes layers.3 too")):
        sequential_max_memory(plan(ordered, 3, 4), ordered)


def test_layers_that_transformers_may_split() -> None:
    weighed = model(9, 9, 9, 9)
    split = replace(weighed, modules=tuple(replace(m, whole=m.role != "layer") for m in weighed.modules))
    with pytest.raises(PlacementError, match=re.escape("may split layers.0")):
        sequential_max_memory(plan(split, 2, 4), split)
    assert sequential_max_memory(plan(split, 4), split)


def test_another_models_footprint_is_refused() -> None:
    weighed = model(9, 9, 9, 9)
    with pytest.raises(PlacementError, match="give the footprint that the plan was solved for"):
        sequential_max_memory(plan(weighed, 2, 4), replace(weighed, quantization="int8"))
