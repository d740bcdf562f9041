"""The roofline with figures that can be added up by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from placement.cards import GB
from placement.footprint import Footprint, footprint
from placement.hardware import Gpu
from placement.plan import Plan, solve
from placement.speed import estimate
from tests.unit.placement.toy import toy_footprint

MB = 10**6
# Four layers of 6 MB and 1 M multiply-adds, a head of 6 MB and 1 M; an embedding that is never read.
MODEL = toy_footprint([6 * MB] * 4, embedding=50 * MB, head=6 * MB, norm=0, works=[MB] * 4, head_work=MB)
# 60 % of 10 GB/s is 6 GB/s: a layer of 6 MB takes 1 ms. 50 % of 20 GFLOP/s is 10 GFLOP/s: 2 MFLOP take 0.2 ms.
GPU = Gpu("toy", 2 * GB, bandwidth=10 * GB, flops=20 * GB)


def plan_on(*gpus: Gpu, model: Footprint = MODEL) -> Plan:
    return solve(model, gpus, block_size=4, max_batch_tokens=64, max_sequences=64, max_context=64, goal="throughput")


def test_one_sequence_is_bound_by_the_weights() -> None:
    # 4 layers and the head: 30 MB, 5 ms; 4 * 10 us of launches; 64 tokens * 4 layers * 4 bytes of KV: 170 ns.
    speed = estimate(MODEL, plan_on(GPU))
    assert speed.single == 10**9 // (5_000_000 + 40_000 + 170) == 198


def test_many_sequences_are_bound_by_arithmetic() -> None:
    # 50 sequences * 5 M * 2 FLOP over 10 GFLOP/s: 50 ms.
    speed = estimate(MODEL, plan_on(GPU), sequences=50)
    assert speed.decode == 50 * 10**9 // (50_000_000 + 40_000)
    assert (speed.sequences, speed.context) == (50, 64)


def test_quantised_weights_compute_at_a_smaller_part_of_peak() -> None:
    # 20 % of 20 GFLOP/s: 500 MFLOP take 125 ms.
    plan = plan_on(GPU)
    assert estimate(MODEL, replace(plan, quantization="nf4"), sequences=50).decode == 50 * 10**9 // 125_040_000


def test_a_long_context_is_read_too() -> None:
    # 1,000 KV heads: 16,000 bytes per token in 4 layers; 16 * 64 tokens are 16.384 MB beside 30 MB of weights.
    model = toy_footprint([6 * MB] * 4, head=6 * MB, norm=0, works=[MB] * 4, kv_heads=[1000] * 4)
    plan = plan_on(replace(GPU, flops=10**15), model=model)
    assert estimate(model, plan, sequences=16).decode == 16 * 10**9 // (46_384 * 1000 // 6 + 40_000)


def test_two_stages_with_two_slots_are_nearly_twice_as_fast() -> None:
    one, two = estimate(MODEL, plan_on(GPU), sequences=64), estimate(MODEL, plan_on(GPU, GPU), sequences=64)
    # Stages of 2 layers, and of 2 layers and the head; two slots of 32: 32 * 3 M * 2 / 10 G = 19.2 ms and 20 us.
    assert two.decode == 64 * 10**9 // (2 * (19_200_000 + 20_000))
    assert one.decode * 1.6 < two.decode < one.decode * 2


def test_a_lone_sequence_gains_nothing_from_a_second_gpu() -> None:
    # One slot: all stages in a row, and 30 us of the hop between them.
    assert estimate(MODEL, plan_on(GPU, GPU)).single == 10**9 // (5_000_000 + 40_000 + 170 + 30_000)


def test_prefill_is_as_fast_as_its_slowest_stage() -> None:
    # A chunk of 512: 512 * 3 M * 2 / 10 G = 307.2 ms and 20 us in the stage with the head.
    assert estimate(MODEL, plan_on(GPU, GPU)).prefill == 512 * 10**9 // 307_220_000


def test_by_default_as_many_sequences_as_the_cache_holds() -> None:
    plan = replace(plan_on(GPU), num_blocks=40)  # 160 tokens: two sequences of 64
    assert estimate(MODEL, plan).sequences == 2
    assert estimate(MODEL, replace(plan, num_blocks=1, max_context=64)).sequences == 1


def test_an_encoder_runs_for_the_prompt_alone() -> None:
    modules = tuple(
        replace(m, stack="encoder" if m.name in ("layers.0", "layers.1") else "decoder") for m in MODEL.modules
    )
    t5 = replace(MODEL, modules=modules)
    # The decoder: 2 layers and the head, 3 ms, 20 us, and the KV of all four layers as the stage counts it.
    assert estimate(t5, plan_on(GPU)).single == 10**9 // (3_000_000 + 20_000 + 170)
    # The encoder: 512 * 2 M * 2 / 10 G = 204.8 ms.
    assert estimate(t5, plan_on(GPU)).prefill == 512 * 10**9 // 204_820_000


@pytest.mark.parametrize(("name", "faster"), [("NVIDIA H200", "L4"), ("RTX 4090", "RTX 3090"), ("H100", "H100 PCIe")])
def test_names_alone_tell_the_faster_of_two(name: str, faster: str) -> None:
    quick, slow = (estimate(MODEL, plan_on(Gpu(each, 2 * GB))) for each in (name, faster))
    assert quick.single > slow.single
    assert quick.decode > slow.decode


def test_a_cpu_is_slower_than_any_gpu() -> None:
    cpu, gpu = (
        estimate(MODEL, plan_on(Gpu("cpu0", 2 * GB, device_type="cpu"))),
        estimate(MODEL, plan_on(Gpu("?", 2 * GB))),
    )
    assert cpu.decode < gpu.decode


def test_gptq_and_awq_are_read_as_gpus_hold_them() -> None:
    weighed = footprint(Path(__file__).parents[2] / "configs" / "zephyr-7b-beta-awq", dtype="bfloat16")
    quick = Gpu("toy", 24 * GB, bandwidth=10_000 * GB, flops=10_000_000 * GB)
    plan, on_cpu = (plan_on(each, model=weighed) for each in (quick, replace(quick, device_type="cpu")))
    assert estimate(weighed, plan) == estimate(weighed.on_gpus(), plan)
    assert estimate(weighed, on_cpu).single > estimate(weighed.on_gpus(), on_cpu).single, "as stored it is smaller"
