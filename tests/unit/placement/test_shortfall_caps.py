"""A refusal under caps names the smallest caps of the same ratio: the least that fit, and they do."""

from __future__ import annotations

import re
from typing import Any

import pytest

from placement.errors import DoesNotFit
from placement.hardware import Gpu
from placement.plan import solve
from placement.reserve import CUDA_CONTEXT_BYTES
from tests.unit.placement.toy import toy_footprint

MB = 10**6
MODEL = toy_footprint([10 * MB] * 8, embedding=50 * MB)
WISHES: dict[str, Any] = {"block_size": 4, "max_batch_tokens": 8, "max_sequences": 4, "max_context": 32}


def knob(*gpus: Gpu, caps: dict[int, str | int]) -> dict[int, int] | None:
    """The caps in megabytes that the refusal names."""
    with pytest.raises(DoesNotFit) as refused:
        solve(MODEL, gpus, **WISHES, max_memory=caps)
    named = [text for text in refused.value.knobs if text.endswith("in the same ratio")]
    if not named:
        return None
    return {int(device): int(size) for device, size in re.findall(r"(\d+)=(\d+)MB", named[0])}


def fits(caps: dict[int, int]) -> bool:
    try:
        solve(MODEL, [Gpu("big", 10**11)] * len(caps), **WISHES, max_memory={i: cap * MB for i, cap in caps.items()})
    except DoesNotFit:
        return False
    return True


def kept() -> int:
    """What a toy's reserve keeps on a GPU under a cap of 1 GB, beside the context."""
    terms = solve(MODEL, [Gpu("big", 10**11)], **WISHES, max_memory={0: "1GB"}).stages[0].reserve
    return sum(term.bytes for term in terms if term.name != "context")


def test_the_least_caps_of_a_ratio() -> None:
    caps = knob(Gpu("big", 10**11), Gpu("big", 10**11), caps={0: "60MB", 1: "100MB"})
    assert caps is not None
    assert abs(5 * caps[0] - 3 * caps[1]) <= 5
    assert fits(caps)
    assert not fits({0: caps[0] - 1, 1: caps[1] - 1})


def test_no_caps_above_what_a_device_has() -> None:
    # Weights are 130 MB; beside its reserve a device has 40, and where it has 120 there are such caps.
    for room, known in ((40, False), (120, True)):
        gpu = Gpu("gpu", CUDA_CONTEXT_BYTES + kept() + room * MB)
        assert (knob(gpu, gpu, caps={0: "30MB", 1: "30MB"}) is not None) == known


def test_one_cap_has_no_ratio() -> None:
    gpu = Gpu("gpu", CUDA_CONTEXT_BYTES + kept() + 120 * MB)
    assert knob(gpu, gpu, caps={1: "30MB"}) is None


def test_a_cap_of_nothing_has_no_ratio() -> None:
    gpu = Gpu("gpu", 10**11)
    assert knob(gpu, gpu, caps={0: 0, 1: "30MB"}) is None
    # Device 1: the embedding's 50 and two layers, 70, and the reserve.
    caps = knob(gpu, gpu, gpu, caps={0: 0, 1: "30MB", 2: "30MB"})
    assert caps is not None
    assert 70 < caps[1] == caps[2]
    assert fits({0: 0, **caps})
    assert not fits({0: 0, 1: caps[1] - 1, 2: caps[2] - 1})
