"""The reserve adds up what stays and takes the largest of what passes."""

from __future__ import annotations

import pytest

from placement.footprint import Footprint
from placement.reserve import CUDA_CONTEXT_BYTES, SAMPLE_ROWS, Reserve, Workload, reserve
from tests.unit.placement.toy import toy_footprint

WORKLOAD = Workload(block_size=16, max_batch_tokens=8, max_sequences=4, max_context=64, kv_dtype="float16")


def total(of: Reserve, *, last: bool, blocks: int, kv: int = 10) -> int:
    return sum(term.bytes for term in of.terms(last=last, blocks=blocks, kv_block_bytes=kv))


def test_temporaries_count_with_the_largest() -> None:
    # activations 5; the largest of prefill 40, dequantisation 30, decode 2 a block, and logits 90 at the end.
    parts = Reserve(0, 0, activations=5, logits=90, prefill=40, dequantisation=30, gather_per_block=2, load_peak=0)
    assert total(parts, last=False, blocks=10) == 5 + 40
    assert total(parts, last=False, blocks=30) == 5 + 60
    assert total(parts, last=True, blocks=30) == 5 + 90


def test_the_load_peak_passes_before_the_cache_is_there() -> None:
    # Running: activations 5 + prefill 40 + 3 blocks of 10 = 75. A load peak of 70 is hidden, one of 100 is not.
    assert total(Reserve(0, 0, 5, 0, 40, 0, 0, load_peak=70), last=False, blocks=2) == 45
    assert total(Reserve(0, 0, 5, 0, 40, 0, 0, load_peak=100), last=False, blocks=2) == 45 + 25


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("blocks", [1, 7, 1000])
def test_terms_and_held_are_one_sum(last: bool, blocks: int) -> None:
    parts = Reserve(11, 7, 5, 90, 40, 30, 2, 300)
    assert parts.held(last=last, blocks=blocks, kv_block_bytes=10) == total(parts, last=last, blocks=blocks) + 10 * (
        blocks + 1
    )


def on_cpu(footprint: Footprint) -> Reserve:
    return reserve(footprint, WORKLOAD, device_type="cpu", budget_bytes=10**6)


def test_a_cpu_device_has_no_context() -> None:
    cpu = on_cpu(toy_footprint([10]))
    cuda = reserve(toy_footprint([10]), WORKLOAD, device_type="cuda", budget_bytes=64 * 10**6)
    assert (cpu.context, cpu.fragmentation) == (0, 0)
    assert (cuda.context, cuda.fragmentation) == (CUDA_CONTEXT_BYTES, 10**6)


def test_what_grows_with_what() -> None:
    small = on_cpu(toy_footprint([10]))
    longer = reserve(
        toy_footprint([10]),
        Workload(16, 16, 4, 64, "float16"),
        device_type="cpu",
        budget_bytes=10**6,
    )
    assert longer.activations == 2 * small.activations
    assert longer.prefill > small.prefill
    assert longer.gather_per_block == small.gather_per_block
    # One row of one logit: float16 and float32, and 72 bytes of scratch for up to SAMPLE_ROWS rows.
    assert small.logits == 4 * (2 + 4 + 72)
    many = Workload(16, 1000, 500, 64, "float16")
    wide = reserve(toy_footprint([10]), many, device_type="cpu", budget_bytes=10**6)
    assert wide.logits == 500 * (2 + 4) + SAMPLE_ROWS * 72
