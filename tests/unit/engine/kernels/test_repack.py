"""Tiles are a permutation of bitsandbytes' bytes, in the order that the module describes."""

from __future__ import annotations

import pytest
import torch

from deployments.engine.kernels import repack

SHAPES = [(16, 64), (48, 256), (64, 192)]


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_4bit_round_trip(n: int, k: int) -> None:
    packed = torch.randint(0, 256, (n * k // 2, 1), dtype=torch.uint8)
    tiles = repack.tile_4bit(packed, n, k)
    assert tiles.shape == (n // 16, k // 64, 128)
    assert torch.equal(repack.untile_4bit(tiles, n, k), packed)


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_8bit_round_trip(n: int, k: int) -> None:
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    tiles = repack.tile_8bit(weight)
    assert tiles.shape == (n // 16, k // 64, 256)
    assert torch.equal(repack.untile_8bit(tiles, n, k), weight)


def test_4bit_bytes_lie_where_the_lanes_read_them() -> None:
    n, k = 32, 128
    packed = torch.randint(0, 256, (n * k // 2, 1), dtype=torch.uint8)
    rows = packed.view(n, k // 2)
    tiles = repack.tile_4bit(packed, n, k).view(torch.uint8).view(n // 16, k // 64, 8, 4, 2, 8)
    for strip, block, r, c, h, q in ((0, 0, 0, 0, 0, 0), (1, 0, 3, 2, 1, 5), (0, 1, 7, 3, 0, 7), (1, 1, 1, 1, 1, 1)):
        column = 64 * block + 8 * q + 2 * c
        assert tiles[strip, block, r, c, h, q] == rows[16 * strip + 8 * h + r, column // 2]


def test_8bit_bytes_lie_where_the_lanes_read_them() -> None:
    n, k = 32, 128
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    tiles = repack.tile_8bit(weight).view(torch.int8).view(n // 16, k // 64, 2, 8, 4, 2, 2, 2, 2)
    for strip, block, p, r, c, h, u, j, i in (
        (0, 0, 0, 0, 0, 0, 0, 0, 0),
        (1, 1, 1, 6, 3, 1, 1, 1, 0),
        (1, 0, 0, 2, 1, 0, 1, 0, 1),
    ):
        column = 64 * block + 8 * (4 * p + 2 * u + i) + 2 * c + j
        assert tiles[strip, block, p, r, c, h, u, j, i] == weight[16 * strip + 8 * h + r, column]


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_scales_round_trip(dtype: torch.dtype) -> None:
    absmax = torch.arange(48 * 4).to(dtype)
    scales = repack.transpose_scales(absmax, 48)
    assert scales.shape == (4, 48)
    assert scales[3, 5] == absmax[5 * 4 + 3]
    assert torch.equal(repack.untranspose_scales(scales), absmax)


@pytest.mark.parametrize(
    ("n", "k", "blocksize", "tiled"),
    [
        (32, 128, 64, True),
        (32, 256, 128, True),
        (32, 128, None, True),
        (24, 128, 64, False),
        (32, 96, None, False),
        (32, 128, 256, False),
        (32, 128, 32, False),
    ],
)
def test_shapes_that_suit(n: int, k: int, blocksize: int | None, tiled: bool) -> None:
    assert (repack.why_not_tiled(n, k, blocksize) is None) == tiled
