"""The order in which the kernels read weights: a permutation of bitsandbytes' bytes, and its inverse.

A *tile* is 16 rows by 64 columns of weights. The matrix units take their left operand from registers, each lane of a
warp holding rows r and r + 8 and, of every 8 columns, the pair 2c and 2c + 1 (r = lane // 4, c = lane % 4). Tiles are
stored so that 16 consecutive bytes are what one lane holds: a warp reads 512 consecutive bytes with one instruction,
and nothing is moved between lanes afterwards.

    4 bits   512 bytes a tile; byte [r][c][h][q] is bitsandbytes' byte for row 8h + r, columns 8q + 2c and 8q + 2c + 1
    8 bits   1,024 bytes a tile; byte [p][r][c][h][u][j][i] is row 8h + r, column 8q + 2c + j with q = 4p + 2u + i

Tiles are ordered by row of tiles, then along the columns. Scales are transposed to [blocks along a row, rows], so that
the rows of a tile read consecutive ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE_ROWS = 16
TILE_COLUMNS = 64

_TO_TILES_4 = (0, 3, 2, 5, 1, 4)
_TO_TILES_8 = (0, 3, 4, 2, 7, 1, 5, 8, 6)


def why_not_tiled(n: int, k: int, blocksize: int | None = None) -> str | None:
    """Why a weight [n, k] can't be stored in tiles (None: it can). `blocksize`: weights per scale, 4 bits only."""
    if n % TILE_ROWS or k % TILE_COLUMNS:
        return f"tiles need rows in multiples of {TILE_ROWS} and columns in multiples of {TILE_COLUMNS}"
    if blocksize is not None and (blocksize % TILE_COLUMNS or k % blocksize):
        return f"tiles need columns in multiples of the blocksize {blocksize}, and it in multiples of {TILE_COLUMNS}"
    return None


def tile_4bit(packed: Tensor, n: int, k: int) -> Tensor:
    """uint8, n * k / 2 bytes as bitsandbytes packs them -> int32 [n/16, k/64, 128]."""
    view = packed.contiguous().view(torch.uint8).view(n // 16, 2, 8, k // 64, 8, 4)
    return view.permute(_TO_TILES_4).reshape(n // 16, k // 64, 512).view(torch.int32)


def untile_4bit(tiles: Tensor, n: int, k: int) -> Tensor:
    """The inverse of `tile_4bit` -> uint8 [n * k / 2, 1]."""
    view = tiles.view(torch.uint8).view(n // 16, k // 64, 8, 4, 2, 8)
    return view.permute(_inverse(_TO_TILES_4)).reshape(-1, 1)


def tile_8bit(weight: Tensor) -> Tensor:
    """int8 [n, k] -> int32 [n/16, k/64, 256]."""
    n, k = weight.shape
    view = weight.contiguous().view(n // 16, 2, 8, k // 64, 2, 2, 2, 4, 2)
    return view.permute(_TO_TILES_8).reshape(n // 16, k // 64, 1024).view(torch.int32)


def untile_8bit(tiles: Tensor, n: int, k: int) -> Tensor:
    """The inverse of `tile_8bit` -> int8 [n, k]."""
    view = tiles.view(torch.int8).view(n // 16, k // 64, 2, 8, 4, 2, 2, 2, 2)
    return view.permute(_inverse(_TO_TILES_8)).reshape(n, k)


def transpose_scales(absmax: Tensor, n: int) -> Tensor:
    """One scale per block in bitsandbytes' order, any dtype -> [blocks along a row, n]."""
    return absmax.view(n, -1).t().contiguous()


def untranspose_scales(scales: Tensor) -> Tensor:
    """The inverse of `transpose_scales` -> [blocks]."""
    return scales.t().reshape(-1)


def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(order.index(axis) for axis in range(len(order)))
