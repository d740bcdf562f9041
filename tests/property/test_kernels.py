"""Laws of the division of work, of tiles, and of the products against float64."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.engine.kernels.ops import linear_4bit, linear_8bit
from deployments.engine.kernels.schedule import Schedule
from deployments.engine.kernels.weights import (
    Nested,
    Weight4,
    Weight8,
    dequantise4,
    dequantise8,
    tile4,
    tile8,
    untile4,
    untile8,
)

BOUND = 4e-3
"""Of a product in bfloat16: one output alone may be rounded by 2^-8 of itself."""


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    panels, steps = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    return Schedule(panels, steps, draw(st.integers(1, min(300, panels * steps))))


@given(schedules())
def test_every_unit_is_computed_once(schedule: Schedule) -> None:
    spans = [schedule.span(p) for p in range(schedule.programs)]
    assert [unit for begin, end in spans for unit in range(begin, end)] == list(range(schedule.units))
    assert max(end - begin for begin, end in spans) - min(end - begin for begin, end in spans) <= 1
    assert all(schedule.owner(unit) == p for p, (begin, end) in enumerate(spans) for unit in range(begin, end))


@given(schedules())
def test_partial_sums_never_share_a_slot(schedule: Schedule) -> None:
    slots: set[int] = set()
    for panel in range(schedule.panels):
        contributors = schedule.contributors(panel)
        if len(contributors) == 1:
            continue
        for program in contributors:
            slot = schedule.slot(program, panel)
            assert slot not in slots
            assert slot < 2 * schedule.programs
            slots.add(slot)


@st.composite
def weights4(draw: st.DrawFn, tiled: bool) -> Weight4:
    blocksize = draw(st.sampled_from([64, 128, 256]))
    n, k = (
        (16 * draw(st.integers(1, 4)), blocksize * draw(st.integers(1, 3)))
        if tiled
        else (draw(st.integers(1, 40)), draw(st.integers(1, 300)))
    )
    torch.manual_seed(draw(st.integers(0, 2**16)))
    packed = torch.randint(0, 256, ((n * k + 1) // 2, 1), dtype=torch.uint8)
    blocks = -(-n * k // blocksize)
    scale = 10.0 ** draw(st.integers(-20, 20))
    code = torch.randn(16)
    if draw(st.booleans()):
        parts = draw(st.sampled_from([parts for parts in (1, 2, 3, 4) if n % (16 * parts) == 0])) if tiled else 1
        nested = Nested(torch.rand(-(-blocks // 256)) * scale, torch.randn(256), torch.rand(parts) * scale)
        return Weight4(n, k, blocksize, packed, torch.randint(0, 256, (blocks,), dtype=torch.uint8), code, nested)
    return Weight4(n, k, blocksize, packed, torch.rand(blocks) * scale, code)


@settings(deadline=None, max_examples=40)
@given(weights4(tiled=True))
def test_tiles_are_the_same_weight(weight: Weight4) -> None:
    tiled = tile4(weight)
    back = untile4(tiled)
    assert tiled.bytes == weight.bytes
    assert torch.equal(back.packed, weight.packed)
    assert torch.equal(back.absmax, weight.absmax)
    assert torch.equal(dequantise4(tiled, torch.float32), dequantise4(weight, torch.float32))


def size(x: torch.Tensor, weight: torch.Tensor) -> float:
    """Of a product; where its few terms happen to cancel, of what terms like these add up to by chance."""
    by_chance = (x.double() ** 2 @ (weight**2).t()).sqrt()
    return max(float((x.double() @ weight.t()).norm()), float(by_chance.norm()))


@settings(deadline=None, max_examples=40)
@given(st.one_of(weights4(tiled=True).map(tile4), weights4(tiled=False)), st.integers(0, 40))
def test_4bit_products_agree_with_float64(weight: Weight4, rows: int) -> None:
    x = torch.randn(rows, weight.k, dtype=torch.bfloat16)
    nested = weight.nested
    outer = (None, None, None) if nested is None else (nested.absmax, nested.code, nested.offset)
    out = linear_4bit(x, weight.packed, weight.absmax, weight.code, *outer, None, weight.n, weight.k, weight.blocksize)
    expected = x.double() @ dequantise4(weight, torch.float64).t()
    assert out.shape == expected.shape
    assert float((out.double() - expected).norm()) <= BOUND * size(x, dequantise4(weight, torch.float64))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 40), st.booleans(), st.integers(0, 2**16))
def test_8bit_products_agree_with_float64(strips: int, columns: int, rows: int, tiled: bool, seed: int) -> None:
    torch.manual_seed(seed)
    n, k = (16 * strips, 64 * columns) if tiled else (7 * strips, 9 * columns)
    weight = Weight8(n, k, torch.randint(-127, 128, (n, k), dtype=torch.int8), torch.rand(n))
    expected_weight = dequantise8(weight, torch.float64)
    if tiled:
        weight = tile8(weight)
        assert torch.equal(untile8(weight).packed.double() * (weight.absmax.double() / 127)[:, None], expected_weight)
    x = torch.randn(rows, k, dtype=torch.bfloat16)
    out = linear_8bit(x, weight.packed, weight.absmax, None, n, k)
    expected = x.double() @ expected_weight.t()
    assert float((out.double() - expected).norm()) <= BOUND * size(x, expected_weight)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton, whose interpreter runs on a CPU")
def test_kernels_in_tritons_interpreter() -> None:
    """In a process of its own: Triton reads the switch when its functions are defined. Products of random shapes,
    with panels shared by programs, partial panels and steps, bias, nested scales and NaN; decodes of few sequences."""
    script = Path(__file__).parent / "interpreted_kernels.py"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all agree" in done.stdout
