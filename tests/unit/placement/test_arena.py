"""What CUDA's allocator takes for an arena, by its rules."""

from __future__ import annotations

import pytest

from placement.arena import layout, taken

MiB = 2**20


def test_a_layout() -> None:
    assert layout((1, 512, 513)) == ((0, 512, 1024), 2048)
    assert layout(()) == ((), 0)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (0, 0),
        # Small segments of 2 MiB: 2 of 1 MiB; 1 MiB and a little is no longer small.
        (MiB, MiB),
        (MiB // 2 + 512, 2 * MiB // 3 + 1),
        # Segments of 20 MiB: 19 of a little over 1 MiB, 2 of 7, 2 of a little under 10.
        (MiB + 512, -(-20 * MiB // 19)),
        (7 * MiB, 10 * MiB),
        (10 * MiB - 512, 10 * MiB),
        # Segments of their own, in units of 2 MiB.
        (10 * MiB, 10 * MiB),
        (10 * MiB + 512, 12 * MiB),
        (125 * MiB, 126 * MiB),
    ],
)
def test_shares_of_segments(size: int, expected: int) -> None:
    assert taken(size) == expected
