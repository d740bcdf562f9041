"""What the benchmark plans, before it needs a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.checkpoint import shape_config
from benchmarks.placement_error import plan_case
from placement.errors import DoesNotFit
from placement.hardware import Gpu


def test_an_encoder_decoders_plan_has_room_for_what_is_served(tmp_path: Path) -> None:
    """With a cap that is just enough: one that holds a block alone would serve nothing, and measure that."""
    shape_config("t5-tiny").save_pretrained(tmp_path)
    gpus = (Gpu("toy", 80 * 2**30),)
    with pytest.raises(DoesNotFit) as caught:
        plan_case("t5-tiny:nf4:0=64MiB", tmp_path, gpus)
    least = 64 * 2**20 + caught.value.need[0] - caught.value.have[0]
    plan = plan_case(f"t5-tiny:nf4:0={least}", tmp_path, gpus)
    assert plan.max_context == 512
    assert plan.capacity_tokens >= 512
