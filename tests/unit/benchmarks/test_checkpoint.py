"""Checkpoints of random packed weights: what is written is what GPTQ and AWQ store, and what the planner is asked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.checkpoint import asked, write
from deployments.engine.grouped import grouped_options
from deployments.engine.grouped_stored import StoredLinear, repack
from deployments.engine.residents import resident_bytes
from placement.footprint import footprint


@pytest.mark.parametrize("shape", ["tiny-gptq", "tiny-awq"])
def test_packed_checkpoints_are_read_as_planned(shape: str, tmp_path: Path) -> None:
    folder = write(shape, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **grouped_options(folder, on_gpu=True))
    linear = model.model.layers[0].mlp.down_proj
    assert isinstance(linear, StoredLinear)
    assert 0.015 < float(linear.dequantised(torch.float32).std()) < 0.025
    repack(model, torch.bfloat16)
    weighed = footprint(folder, **asked(shape, shape.removeprefix("tiny-")))
    assert resident_bytes([model]) == weighed.on_gpus().bytes


def test_what_a_shape_is_not_packed_as_is_refused() -> None:
    assert asked("tiny", "nf4") == {"quantization": "nf4"}
    for shape, quantization in (("tiny", "gptq"), ("tiny-awq", "gptq"), ("tiny-gptq", "nf4")):
        with pytest.raises(ValueError, match=f"the checkpoint of {shape} is .*, and {quantization} was asked for"):
            asked(shape, quantization)
