"""The benchmark's model is what it says, and every line is printed; how fast is for the benchmark to say."""

from __future__ import annotations

import pytest

from benchmarks.placement_speed import LAYERS, main, model


def test_the_model_is_llama_405b() -> None:
    weighed = model()
    elements = sum(tensor.elements for module in weighed.modules for tensor in module.tensors)
    assert len(weighed.layers) == LAYERS == 126
    assert elements == 405_853_388_800


def test_every_goal_has_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--repeats", "1"])
    lines = capsys.readouterr().out.splitlines()
    for goal in ("throughput", "capacity", "latency"):
        assert any(f"goal={goal}" in line and "order=given" in line and " ms " in line for line in lines)
    assert any("order=best" in line for line in lines)
