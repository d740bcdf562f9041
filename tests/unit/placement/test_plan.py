"""`solve`: its arguments, its refusals, and the knobs that a refusal names."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from placement.errors import DoesNotFit, PlacementError
from placement.export import explain
from placement.flashinfer import stored_kv
from placement.footprint import Footprint
from placement.hardware import Gpu, Inventory, Node, virtual_cpu_devices
from placement.kv import LayerKv
from placement.plan import STATE, Plan, answer, solve
from placement.question import ask
from placement.reserve import CUDA_CONTEXT_BYTES
from tests.unit.placement.toy import KV_PER_TOKEN, small_sampler, toy_footprint

MODEL = toy_footprint([10_000] * 4, embedding=30_000)
WISHES: dict[str, Any] = {"block_size": 4, "max_batch_tokens": 8, "max_sequences": 4, "max_context": 32}


@pytest.fixture(autouse=True)
def _small_sampler() -> Iterator[None]:
    with small_sampler():
        yield


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


BLOCK = 4 * 4 * KV_PER_TOKEN + 4 * 4
"""Bytes of a block of 4 tokens in 4 layers and of its tokens' ids, where the chunks are long: prefill attention is then
the largest temporary, which does not depend on the blocks."""


def fixed_bytes() -> int:
    plan = plan_on("100MB", max_batch_tokens=64)
    (stage,) = plan.stages
    return stage.weight_bytes + stage.reserve_bytes + plan.kv_bytes(stage) - (plan.num_blocks + 1) * BLOCK


def test_max_context_is_at_most_the_capacity() -> None:
    # 3 blocks and the scratch block on top of all that does not depend on them.
    plan = plan_on(fixed_bytes() + 4 * BLOCK, max_batch_tokens=64)
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
    plan = solve(MODEL, [gpu], **WISHES, max_memory={0: "1GB"})
    assert plan.stages[0].budget_bytes == 10**9 + CUDA_CONTEXT_BYTES
    assert {term.name for term in plan.stages[0].reserve} >= {"context", "fragmentation"}
    # Cap and context together are more than there is: the device is the bound.
    assert solve(MODEL, [gpu], **WISHES, max_memory={0: 10**10}).stages[0].budget_bytes == 10**10


def test_a_cap_above_the_device_is_refused() -> None:
    with pytest.raises(PlacementError, match=r"gives device 0 \(toy\) 99.0 GB, but it has 10.0 GB; lower the cap"):
        solve(MODEL, [Gpu("toy", 10**10)], **WISHES, max_memory={0: "99GB"})
    with pytest.raises(PlacementError, match=r"3.00 GB, but 2.00 GB of its 10.0 GB are free"):
        solve(MODEL, [Gpu("toy", 10**10, free_bytes=2 * 10**9)], **WISHES, max_memory={0: "3GB"})


def test_other_tenants_memory_is_not_ours() -> None:
    gpu = Gpu("toy", 10**10, free_bytes=2 * 10**9)
    assert solve(MODEL, Inventory((Node("a", (gpu,)),)), **WISHES).stages[0].budget_bytes == 2 * 10**9


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"goal": "speed"}, "use one of throughput, capacity, latency"),
        ({"dtype": "float32"}, "weighed with dtype float16, not float32"),
        ({"kv_dtype": "int8"}, "use one of bfloat16"),
        ({"max_memory": {1: "1GB"}}, "max_memory names device 1, but there is only device 0; leave it out"),
        ({"max_memory": {0: "1XB"}}, "600MB or 24GiB"),
        ({"block_size": 0}, "block_size is 0, but it must be at least 1"),
        ({"min_concurrency": 0}, "min_concurrency is 0, but it must be at least 1"),
        ({"order": "any"}, "use one of given, best"),
        ({"min_context": 33}, "min_context is 33 tokens, but max_context is 32"),
        ({"concurrent_context": 0}, "concurrent_context is 0 tokens"),
        ({"min_concurrency": 5}, "min_concurrency is 5, but max_sequences is 4; raise max_sequences or lower"),
        ({"allow_cpu": "much"}, "600MB or 24GiB"),
        ({"pins": {"layers.9": 0}}, "layers.9 is not a unit of placement of toy; did you mean layers"),
        ({"pins": {"layers.0": 2}}, "layers.0 is pinned to device 2, but there is only device 0"),
        ({"pins": {"layers.0": "cpu"}}, "may hold nothing; give allow_cpu bytes"),
        ({"pins": {"rotary": 0}}, "rotary can't be pinned: every stage holds a copy"),
    ],
)
def test_refusals_name_the_setting(wishes: dict[str, Any], message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        plan_on("100MB", **wishes)


def test_no_device() -> None:
    with pytest.raises(PlacementError, match="at least one GPU"):
        solve(MODEL, (), **WISHES)


def modules_of(plan: Plan) -> dict[str, int]:
    return {name: stage.device for stage in plan.stages for name in stage.modules}


def test_pins_are_kept_exactly() -> None:
    at = modules_of(plan_on("1MB", "1MB", "1MB", pins={"layers.1": 1, "head": 2}))
    assert (at["layers.1"], at["head"], at["norm"]) == (1, 2, 2)
    assert set(modules_of(plan_on("1MB", "1MB", pins={"layers": 1})).values()) == {1}, "a prefix pins all below it"


@pytest.mark.parametrize(
    ("pins", "message"),
    [
        ({"layers.0": 1, "head": 0}, r"layers.0 is pinned to device 1 and head, .*, to device 0: .*order=\"best\""),
        ({"embed": 0, "layers.0": 1}, "the two live on one device, with layer 0; pin them alike"),
    ],
)
def test_pins_that_no_pipeline_keeps_are_refused(pins: dict[str, int], message: str) -> None:
    with pytest.raises(PlacementError, match=message) as caught:
        plan_on("1MB", "1MB", pins=pins)
    assert not isinstance(caught.value, DoesNotFit)


def test_pins_against_the_order_are_kept_in_the_best_order() -> None:
    at = modules_of(plan_on("1MB", "1MB", pins={"layers.0": 1, "head": 0}, order="best"))
    assert (at["embed"], at["head"]) == (1, 0)
    with pytest.raises(PlacementError, match=r"layers.2 is pinned .* a stage is one run of layers"):
        plan_on("1MB", "1MB", pins={"layers.0": 0, "layers.1": 1, "layers.2": 0}, order="best")


def gpu_with(room: int, model: Footprint = MODEL) -> Gpu:
    """A GPU with `room` bytes, more or less, beside what the reserve of a toy with some KB of weights takes."""
    gpu = Gpu("toy", 10**10)
    for _ in range(2):  # a part of it is for fragmentation
        gpu = Gpu("toy", solve(model, [gpu], **WISHES).stages[0].reserve_bytes + room)
    return gpu


def test_the_cpu_is_the_last_resort() -> None:
    gpu = gpu_with(10 * 2**20)
    big = toy_footprint([4 * 2**20] * 4)
    assert [s.gpu.device_type for s in solve(MODEL, [gpu], **WISHES, allow_cpu="1GB").stages] == ["cuda"]
    with pytest.raises(DoesNotFit):
        solve(big, [gpu], **WISHES)
    first, second = solve(big, [gpu], **WISHES, allow_cpu="1GB").stages
    assert (first.gpu.device_type, second.gpu.device_type, second.device) == ("cuda", "cpu", 1)
    assert second.layers == (first.layers[1], 4)
    assert first.budget_bytes - first.weight_bytes - first.reserve_bytes < 4 * 2**20, "no further layer fits the GPU"
    at = modules_of(solve(big, [gpu], **WISHES, allow_cpu="1GB", pins={"layers.1": "cpu"}))
    assert (at["layers.0"], at["layers.1"], at["head"]) == (0, 1, 1)


def test_the_cpu_is_not_taken_for_what_only_a_longer_pipeline_needs() -> None:
    # 8 tokens of 2 bytes * 10**6 would come in for each of two slots, 32 MB: the GPU has room for all else.
    wide = replace(MODEL, geometry=replace(MODEL.geometry, hidden=10**6))
    gpu = gpu_with(8 * 10**6, wide)
    plan = solve(wide, [gpu], **WISHES)
    for goal in ("throughput", "capacity", "latency"):
        assert solve(wide, [gpu], goal=goal, **WISHES, allow_cpu="10GB") == plan


def test_attention_reaches_the_reserve() -> None:
    gpu, heads = Gpu("toy", 10**10), toy_footprint([10_000] * 4, kv=(LayerKv(1, 64),) * 4)
    plans = {how: solve(heads, [gpu], **WISHES, attention=how) for how in (None, "flashinfer", "torch")}
    graphs = {how: [term.name for term in plan.stages[0].reserve].count("graphs") for how, plan in plans.items()}
    assert graphs == {None: 1, "flashinfer": 1, "torch": 0}
    assert plans[None] == plans["flashinfer"]


@pytest.mark.parametrize(("head_dim", "kv_dtype", "stored"), [(80, None, 128), (96, "fp8", 128), (64, "fp8", 128)])
def test_blocks_for_flashinfer_have_its_head_sizes(head_dim: int, kv_dtype: str | None, stored: int) -> None:
    gpu, heads = Gpu("toy", 10**10), toy_footprint([10_000] * 4, kv=(LayerKv(2, head_dim),) * 4)
    plans = {how: solve(heads, [gpu], **WISHES, attention=how, kv_dtype=kv_dtype) for how in (None, "torch")}
    for plan, size in ((plans[None], stored), (plans["torch"], head_dim)):
        token = 4 * 2 * 2 * size * (1 if kv_dtype else 2)
        assert (plan.stages[0].kv_block_bytes, plan.sequence_bytes) == (4 * token, 32 * token)
        assert stored_kv(heads.geometry.kv, plan.kv_dtype, plan.attention) == (LayerKv(2, size),) * 4
    on_cpu = solve(heads, virtual_cpu_devices(("10GB",)), **WISHES, kv_dtype=kv_dtype)
    assert on_cpu.stages[0].kv_block_bytes == plans["torch"].stages[0].kv_block_bytes


def test_attention_that_can_not_be_is_refused() -> None:
    gpu = Gpu("toy", 10**10)
    with pytest.raises(PlacementError, match="attention 'sdpa' is not known; use one of flashinfer, torch"):
        solve(MODEL, [gpu], **WISHES, attention="sdpa")  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(PlacementError, match=r"does not serve toy: .* 64, 128, 256, not of 1; use torch"):
        solve(MODEL, [gpu], **WISHES, attention="flashinfer")
    with pytest.raises(PlacementError, match="attention flashinfer needs a GPU"):
        plan_on("100MB", attention="flashinfer")
    assert plan_on("100MB", attention="torch") == plan_on("100MB")


def test_what_is_demanded_is_there() -> None:
    roomy = plan_on("200kB", "200kB")
    assert plan_on("200kB", "200kB", min_context=32).num_blocks == roomy.num_blocks
    least = plan_on("1MB", min_context=32).stages[0]
    tight = least.weight_bytes + least.reserve_bytes
    assert plan_on(tight + 9 * 64, min_context=32).num_blocks >= 8
    with pytest.raises(DoesNotFit):
        plan_on(tight - 64 * 8, min_concurrency=4)


def test_a_plan_says_what_one_sequence_holds() -> None:
    model = toy_footprint([10] * 2, kv=(LayerKv(1, 1), LayerKv(1, 1, window=8, recurrent_elements=3)))
    plan = solve(model, virtual_cpu_devices(("1MB",)), **WISHES)
    # 32 tokens * 2 layers * 4 bytes + 12 bytes of state; with a window of 8: (32 + 8) * 4 + 12.
    assert (plan.sequence_bytes, plan.window_aware_bytes) == (268, 172)
    assert "holds 268 bytes of KV cache and state; a cache that frees blocks behind sliding windows" in explain(plan)
    assert plan.stages[0].kv_block_bytes == 2 * 4 * 4, "the window lowers no byte of the plan"
    state = next(term for term in plan.stages[0].reserve if term.name == STATE)
    assert state.bytes == 4 * 12


def test_answer_is_solve_without_reasons() -> None:
    devices = virtual_cpu_devices(("250kB", "250kB"))
    assert answer(ask(MODEL, devices, **WISHES)) == solve(MODEL, devices, **WISHES)
    assert answer(ask(MODEL, virtual_cpu_devices(("10kB",)), **WISHES)) is None


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
    assert settings
    for name, value in settings.items():
        plan_on("100kB", **{"max_batch_tokens": 4096, name: int(value)})
        with pytest.raises(DoesNotFit):
            plan_on("100kB", **{"max_batch_tokens": 4096, name: int(value) + 1})


def knob(caught: pytest.ExceptionInfo[DoesNotFit], pattern: str) -> int:
    match = re.search(pattern, str(caught.value))
    assert match is not None, f"{pattern} is not among {caught.value.knobs}"
    return int(match[1].replace(",", ""))


def test_the_longest_context_that_fits_is_a_knob() -> None:
    size = fixed_bytes() + 6 * BLOCK  # 5 blocks and the scratch block
    with pytest.raises(DoesNotFit) as caught:
        plan_on(size, max_batch_tokens=64, min_context=32)
    assert knob(caught, r"min_context: (\d+) instead of 32") == 20
    assert plan_on(size, max_batch_tokens=64, min_context=20).num_blocks == 5
    with pytest.raises(DoesNotFit) as caught:
        plan_on(size, max_batch_tokens=64, min_concurrency=3, concurrent_context=8)
    assert knob(caught, r"min_concurrency: (\d+) instead of 3") == 2


def test_raising_one_cap_is_a_knob() -> None:
    gpu = gpu_with(200 * 10**6)
    big = toy_footprint([20 * 10**6] * 4)
    caps = {0: "30MB", 1: "35MB"}
    with pytest.raises(DoesNotFit) as caught:
        solve(big, [gpu, gpu], **WISHES, max_memory=caps)
    found = re.search(r"max_memory: (\d+) MB more for device (\d)", str(caught.value))
    assert found is not None
    more, device = map(int, found.groups())

    def raised(megabytes: int) -> dict[int, str]:
        return caps | {device: f"{int(caps[device].removesuffix('MB')) + megabytes}MB"}

    solve(big, [gpu, gpu], **WISHES, max_memory=raised(more))
    with pytest.raises(DoesNotFit):
        solve(big, [gpu, gpu], **WISHES, max_memory=raised(more - 1))


def test_a_device_that_is_shut_has_a_refusal_too() -> None:
    gpu = gpu_with(200 * 10**6)
    with pytest.raises(DoesNotFit, match="MB more for device 0"):
        solve(MODEL, [gpu, gpu], **WISHES, max_memory={0: 0, 1: 0})


def test_fp8_for_the_cache_is_a_knob() -> None:
    cached = toy_footprint([10] * 2, kv=(LayerKv(1, 500_000),) * 2)  # 2 MB a token and layer in 16 bits
    # 16 tokens and 4 of scratch are 80 MB, gathered 64 more; with fp8 40 MB, and prefill attention still takes 64.
    gpu = gpu_with(120 * 10**6)
    wishes = WISHES | {"max_batch_tokens": 1, "max_sequences": 1, "max_context": 16, "min_context": 16}
    with pytest.raises(DoesNotFit) as caught:
        solve(cached, [gpu], **wishes)
    assert "kv_dtype: fp8 instead of float16" in caught.value.knobs
    assert solve(cached, [gpu], **wishes, kv_dtype="fp8").kv_dtype == "float8_e4m3fn"


def test_more_devices_of_the_largest_kind_are_a_knob() -> None:
    # 30,000 embedding + 4 * 10,000 layers are 70 kB and more; without the embedding two layers fit in 55 kB.
    with pytest.raises(DoesNotFit) as caught:
        plan_on("55kB", "5kB")
    more = knob(caught, r"(\d) more devices? like device 0")
    assert len(plan_on("55kB", "5kB", *["55kB"] * more).stages) == 1 + more
