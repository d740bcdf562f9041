"""Which decodes are left to the kernel of our own, and what they need; the kernel itself is run by
tests/property/interpreted_kernels.py, and by tests/gpu."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from deployments.engine.attention_decodes import space_bytes, splits_beyond, takes
from deployments.engine.attention_tables import Shape
from deployments.engine.flashinfer_fit import Kind

KIND = Kind(32, 8, 128, torch.bfloat16, torch.bfloat16, None, None)


@pytest.mark.parametrize(
    ("kind", "sequences", "expected"),
    [
        (KIND, 1, True),
        (KIND, 2048, True),
        (KIND, 2049, False),  # 16,392 KV heads of all, which it has no counters for
        (replace(KIND, window=64), 1, False),
        (replace(KIND, softcap=30.0), 1, False),
        (replace(KIND, kv_dtype=torch.float8_e4m3fn), 1, False),
        (replace(KIND, kv_heads=2), 1, True),  # 16 query heads to each
        (replace(KIND, heads=34, kv_heads=2), 1, False),
    ],
)
def test_what_it_takes(kind: Kind, sequences: int, expected: bool) -> None:
    assert takes(kind, Shape(sequences, sequences, sequences)) is expected


def test_splits_are_as_many_programs_whatever_the_heads() -> None:
    assert [splits_beyond(heads) for heads in (1, 2, 8, 32, 64)] == [512, 256, 64, 16, 16]


def test_space_is_for_sums_weights_and_largest_scores_of_every_split() -> None:
    """320 splits of 32 heads: 128 sums, a weight and a score, of 4 bytes each; parts are a multiple of 4."""
    assert space_bytes(KIND, 256, 64) == 320 * 32 * 130 * 4
    assert space_bytes(replace(KIND, heads=9, kv_heads=3), 1, 2) == 28 * 130 * 4
