"""`solve`: its arguments, its refusals, and the knobs that a refusal names."""

from __future__ import annotations

import pickle
import re
from typing import Any

import pytest

from placement.errors import DoesNotFit, PlacementError
from placement.hardware import Gpu, Inventory, Node, virtual_cpu_devices
from placement.plan import Plan, solve
from placement.reserve import CUDA_CONTEXT_BYTES
from tests.unit.placement.toy import KV_PER_TOKEN, toy_footprint

MODEL = toy_footprint([10_000] * 4, embedding=30_000)
WISHES: dict[str, Any] = {"block_size": 4, "max_batch_tokens": 8, "max_sequences": 4, "max_context": 32}


def plan_on(*sizes: str | int, **wishes: Any) -> Plan:
    return solve(MODEL, virtual_cpu_devices(sizes), **{**WISHES, **wishes})


def test_blocks_are_what_the_bottleneck_leaves() -> None:
    plan = plan_on("250kB", "250kB", max_sequences=10**6)
    # One more block would cost 2 layers * 4 tokens * 4 bytes, and 2 * 4 tokens * 7 bytes to gather it in a decode.
    assert 0 <= min(plan.unused_bytes(stage) for stage in plan.stages) < 32 + 56
    assert plan.capacity_tokens == 4 * plan.num_blocks
    for stage in plan.stages:
        first, past = stage.layers
        assert stage.kv_block_bytes == KV_PER_TOKEN * 4 * (past - first)


def test_blocks_stop_at_what_sequences_can_use() -> None:
    assert plan_on("100MB").num_blocks == 4 * 32 // 4


def test_max_context_is_at_most_the_capacity() -> None:
    # A block is 4 tokens * 4 layers * 4 bytes = 64 bytes: 3 blocks and the scratch block on top of all else,
    # which does not depend on the blocks when the chunks are long (prefill attention is the largest temporary).
    full = plan_on("100MB", max_batch_tokens=64).stages[0]
    fixed = full.weight_bytes + full.reserve_bytes
    plan = plan_on(fixed + 4 * 64, max_batch_tokens=64)
    assert (plan.num_blocks, plan.capacity_tokens, plan.max_context) == (3, 12, 12)


def test_a_model_context_is_the_default_and_the_limit() -> None:
    assert plan_on("100MB", max_context=None).max_context == 64
    with pytest.raises(PlacementError, match="max_context is 65 tokens, but toy was made for 64"):
        plan_on("100MB", max_context=65)


def test_kv_dtype_doubles_the_block() -> None:
    half, full = plan_on("100MB"), plan_on("100MB", kv_dtype="float32")
    assert full.stages[0].kv_block_bytes == 2 * half.stages[0].kv_block_bytes
    assert (half.kv_dtype, full.kv_dtype) == ("float16", "float32")


def test_a_cap_bounds_all_but_the_cuda_context() -> None:
    gpu = Gpu("toy", 10**10)
    plan = solve(MODEL, [gpu], **WISHES, max_memory={0: "50MB"})
    assert plan.stages[0].budget_bytes == 50 * 10**6 + CUDA_CONTEXT_BYTES
    assert {term.name for term in plan.stages[0].reserve} >= {"context", "fragmentation"}
    assert solve(MODEL, [gpu], **WISHES, max_memory={0: "99GB"}).stages[0].budget_bytes == 10**10


def test_other_tenants_memory_is_not_ours() -> None:
    gpu = Gpu("toy", 10**10, free_bytes=2 * 10**9)
    assert solve(MODEL, Inventory((Node("a", (gpu,)),)), **WISHES).stages[0].budget_bytes == 2 * 10**9


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"goal": "speed"}, "use one of throughput, capacity, latency"),
        ({"dtype": "float32"}, "weighed with dtype float16, not float32"),
        ({"kv_dtype": "fp8"}, "use one of bfloat16"),
        ({"max_memory": {1: "1GB"}}, "max_memory names device 1, but there are 1"),
        ({"max_memory": {0: "1XB"}}, "600MB or 24GiB"),
        ({"block_size": 0}, "at least 1"),
    ],
)
def test_refusals_name_the_setting(wishes: dict[str, Any], message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        plan_on("100MB", **wishes)


def test_no_device() -> None:
    with pytest.raises(PlacementError, match="at least one GPU"):
        solve(MODEL, (), **WISHES)


def test_does_not_fit_names_need_have_and_knobs_that_work() -> None:
    with pytest.raises(DoesNotFit) as caught:
        plan_on("100kB", max_batch_tokens=4096)
    error = caught.value
    assert error.have == (100_000,)
    assert error.need[0] > 100_000
    assert f"device 0 needs {error.need[0]:,} bytes and has 100,000" in str(error)
    assert "\n" not in str(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)

    more = re.search(r"give each device (\d+) MB more", error.knobs[0])
    assert more is not None
    plan_on(100_000 + int(more[1]) * 10**6, max_batch_tokens=4096)
    settings = dict(re.findall(r"(max_\w+): (\d+) instead", str(error)))
    for name, value in settings.items():
        plan_on("100kB", **{"max_batch_tokens": 4096, name: int(value)})


def test_one_more_device_is_a_knob_when_it_helps() -> None:
    # 30,000 embedding + 4 * 10,000 layers are 70 kB and more; without the embedding two layers fit in 55 kB.
    with pytest.raises(DoesNotFit) as caught:
        plan_on("55kB")
    count = re.search(r"(\d) more device", str(caught.value))
    assert count is not None
    assert len(plan_on(*["55kB"] * (1 + int(count[1]))).stages) == 1 + int(count[1])
