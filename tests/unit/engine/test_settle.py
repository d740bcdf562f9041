"""How large the kernels' buffers are made before layers settle."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from deployments.engine.settle import buffer_bytes
from placement import reserve as terms
from placement.workload import Workload
from tests.unit.placement.test_reserve import matrix, model

WORKLOAD = Workload(16, max_batch_tokens=8, max_sequences=4, max_context=64, kv_dtype="bfloat16")


def test_a_buffer_holds_the_largest_linear_and_another_fused_with_it() -> None:
    four: Any = bnb.nn.Linear4bit
    found = buffer_bytes(
        nn.Sequential(
            four(64, 96, compute_dtype=torch.bfloat16),
            four(64, 128, compute_dtype=torch.bfloat16),
            bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False),
            nn.Linear(64, 1000),
        )
    )
    assert found == {torch.device("cpu"): 2 * 64 * 128 * 2}
    assert buffer_bytes(nn.Sequential(four(64, 96, compute_dtype=torch.float32))) == {
        torch.device("cpu"): 2 * 64 * 96 * 4
    }
    assert buffer_bytes(nn.Linear(64, 64)) == {}


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_plan_counts_no_less(quantization: str) -> None:
    kind: Any = bnb.nn.Linear4bit if quantization == "nf4" else bnb.nn.Linear8bitLt
    made = buffer_bytes(nn.Sequential(kind(64, 128), kind(64, 32)))
    layer = (matrix("up", 128, 64, linear=True), matrix("q", 32, 64, linear=True))
    weighed = replace(model(layer, quantization=quantization), dtype="bfloat16")
    plain = replace(weighed, quantization="bf16")
    counted, beside = (terms.reserve(each, WORKLOAD, device_type="cuda").buffers for each in (weighed, plain))
    assert list(made.values()) == [counted - beside - terms._KERNEL_BYTES]
