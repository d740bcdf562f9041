"""How large the kernels' buffers are made before layers settle."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from deployments.engine.grouped_stored import StoredLinear
from deployments.engine.settle import buffer_bytes, expand_segments
from placement import reserve as terms
from placement.recipe import Grouped
from placement.workload import Workload
from tests.unit.placement.test_reserve import matrix, model

GPTQ = Grouped(method="gptq", bits=4, group_size=32)
WORKLOAD = Workload(16, max_batch_tokens=8, max_sequences=4, max_context=64, kv_dtype="bfloat16")


def stored(inputs: int, outputs: int) -> StoredLinear:
    return StoredLinear(nn.Linear(inputs, outputs), GPTQ, less_one=True)


def test_a_buffer_holds_the_largest_linear_and_another_fused_with_it() -> None:
    four: Any = bnb.nn.Linear4bit
    found = buffer_bytes(
        nn.Sequential(
            four(64, 96, compute_dtype=torch.bfloat16),
            four(64, 128, compute_dtype=torch.bfloat16),
            bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False),
            nn.Linear(64, 1000),
        ),
        torch.bfloat16,
    )
    assert found == {torch.device("cpu"): 2 * 64 * 128 * 2}
    assert buffer_bytes(nn.Sequential(four(64, 96, compute_dtype=torch.float32)), torch.bfloat16) == {
        torch.device("cpu"): 2 * 64 * 96 * 4
    }
    assert buffer_bytes(nn.Linear(64, 64), torch.bfloat16) == {}


@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 2), (torch.float32, 4)])
def test_linears_of_gptq_and_awq_count_in_the_plans_dtype(dtype: torch.dtype, size: int) -> None:
    assert buffer_bytes(nn.Sequential(stored(64, 96), stored(64, 128)), dtype) == {
        torch.device("meta"): 2 * 64 * 128 * size
    }


@pytest.mark.parametrize(
    ("quantization", "kind"),
    [("nf4", bnb.nn.Linear4bit), ("int8", bnb.nn.Linear8bitLt), ("gptq-4bit", stored)],
    ids=["nf4", "int8", "gptq"],
)
def test_a_plan_counts_no_less(quantization: str, kind: Any) -> None:
    made = buffer_bytes(nn.Sequential(kind(64, 128), kind(64, 32)), torch.bfloat16)
    layer = (matrix("up", 128, 64, linear=True), matrix("q", 32, 64, linear=True))
    weighed = replace(model(layer, quantization=quantization), dtype="bfloat16")
    plain = replace(weighed, quantization="bf16")
    counted, beside = (terms.reserve(each, WORKLOAD, device_type="cuda").buffers for each in (weighed, plain))
    assert list(made.values()) == [counted - beside - terms._KERNEL_BYTES]


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [(False, "expandable_segments:True"), (True, "expandable_segments:True,pinned_reserve_segment_size_mb:64")],
)
def test_segments_expand_and_on_gpus_pinned_memory_is_one(
    gpus: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", said.append, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    expand_segments()
    assert said == [expected]
