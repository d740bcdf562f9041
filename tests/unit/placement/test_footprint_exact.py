"""The footprint against really loaded models, byte for byte."""

from __future__ import annotations

from pathlib import Path

import pytest

from placement.export import device_map
from placement.footprint import footprint
from placement.hardware import virtual_cpu_devices
from placement.plan import solve
from tests.unit.placement.tiny_models import CONFIGS, LAYERS, QUANTIZATIONS, held_bytes, load, save

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize(("quantization", "double_quant"), QUANTIZATIONS)
def test_two_stages_hold_what_was_planned(folder: Path, quantization: str, double_quant: bool) -> None:
    dtype = DTYPES.get(quantization, "bfloat16")
    weighed = footprint(folder, quantization=quantization, double_quant=double_quant, dtype=dtype)
    plan = solve(
        weighed,
        virtual_cpu_devices(("40MB", "40MB")),
        block_size=4,
        max_batch_tokens=16,
        max_sequences=4,
        max_context=64,
    )
    assert len(plan.stages) == 2

    model = load(folder, quantization, double_quant, dtype, device_map(plan, "cpu"))

    for module in weighed.modules:
        assert held_bytes(model, [module.name]) == module.bytes, module.name
    for stage in plan.stages:
        assert held_bytes(model, (*stage.modules, *stage.copies)) == stage.weight_bytes
    assert held_bytes(model, [""]) == weighed.bytes


def test_every_layer_is_counted(folder: Path) -> None:
    weighed = footprint(folder, quantization="nf4")
    assert len(weighed.layers) == len(weighed.geometry.kv) == LAYERS
    assert {len(module.tensors) for module in weighed.layers} == {len(weighed.layers[0].tensors)}
