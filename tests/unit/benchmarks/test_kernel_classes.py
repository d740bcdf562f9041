"""What kernels are for, by their names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.kernel_classes import OTHER, kernel_class
from deployments.engine import kernels

SOURCES = sorted(Path(kernels.__file__).parent.glob("*.cu"))


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_our_products_are_products(source: Path) -> None:
    names = re.findall(r'extern "C" __global__ void (?:__launch_bounds__\([^)]*\) )?(\w+)\(', source.read_text("utf-8"))
    assert names
    assert {kernel_class(name) for name in names} == {"GEMM"}


def test_our_attention_is_attention() -> None:
    source = (Path(kernels.__file__).parent / "attend.py").read_text("utf-8")
    (name,) = re.findall(r"@triton.jit\(.*\)\ndef (\w+)\(", source)
    assert kernel_class(name) == "attention"


def test_names_that_hold_theirs_are_not() -> None:
    assert kernel_class("a_wide_reduction") == OTHER
    assert kernel_class("triton_poi_fused_linear_4bit_mul_silu") == "fused elementwise"
