"""How a product of a few rows is divided among the warps and blocks of a GPU. Integers only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product

GROUPS = (1, 2, 4)
"""Groups of 8 rows of x that one launch computes."""
MOST_ROWS = 8 * GROUPS[-1]
SHARED_BYTES = 226 * 2**10
"""Of a block, at most, on GPUs with 228 KiB for a multiprocessor (capability 9.0 and 10.x); others have less."""
TABLE_BYTES = 32 * 2**10
"""All pairs of 4-bit weights, a copy for each lane. The table begins at a multiple of its size."""
_OFFSETS = 2**32
"""The kernel counts a weight's bytes in 32 bits."""
_REGISTERS = {4: {1: 44, 2: 44, 4: 56}, 8: {1: 48, 2: 64, 4: 64}}
"""By bits and groups: registers of a lane for sums and for weights on their way, above which kernels were slower."""


@dataclass(frozen=True, slots=True)
class Cut:
    """The kernel's compile-time constants that divide the work; `skinny.cu` explains them."""

    strips: int
    """16-row strips of the weight that a warp computes at once."""
    depth: int
    """64-column blocks of each strip that a warp reads a step ahead."""
    across: int
    """Warps of a block side by side over strips."""
    along: int
    """Warps of a block along the columns."""
    cluster: int = 1
    """Blocks along the columns."""
    parts: int = 1
    """Of x, waited for one after the other: 1, 2 or 4."""

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * self.across * self.along

    @property
    def block_strips(self) -> int:
        """16-row strips of a block."""
        return self.strips * self.across

    def blocks(self, n: int) -> int:
        """For a weight of n rows."""
        return -(-n // (16 * self.block_strips)) * self.cluster

    def row_bytes(self, k: int) -> int:
        """Of a row of x in a block's shared memory: 16 bytes apart from a multiple of 128, so that eight rows fall on
        different banks."""
        return 128 * -(-(k // 64) // self.cluster) + 16

    def shared_bytes(self, k: int, bits: int, groups: int) -> int:
        """The table, what lies before it and x, or the sums at the end, whichever is larger."""
        inputs = (2 * TABLE_BYTES if bits == 4 else 0) + 8 * groups * self.row_bytes(k)
        return max(inputs, 4 * self.along * 8 * groups * (16 * self.block_strips + 4))

    def fits(self, n: int, k: int, bits: int, groups: int, shared: int) -> bool:
        """Whether the kernel can compute a weight [n, k] so, in blocks of at most `shared` bytes of shared memory."""
        enough = n // 16 >= self.block_strips and k // 64 >= self.cluster
        counted = n * k * bits // 8 < _OFFSETS
        return enough and counted and self.threads <= 512 and self.shared_bytes(k, bits, groups) <= shared


def groups_of(rows: int) -> int:
    """The smallest number of groups that hold `rows`, at most `MOST_ROWS`."""
    return next(groups for groups in GROUPS if rows <= 8 * groups)


def choose_cut(n: int, k: int, bits: int, groups: int, multiprocessors: int, shared: int) -> Cut | None:
    """The best of `ranked_cuts`, for a shape that was not measured. None where there is none: x does not fit shared
    memory, or only in parts so small that the kernel was measured to be slower than others."""
    return next(iter(ranked_cuts(n, k, bits, groups, multiprocessors, shared)), None)


@cache
def ranked_cuts(n: int, k: int, bits: int, groups: int, multiprocessors: int, shared: int) -> tuple[Cut, ...]:
    """Those first that keep all multiprocessors equally busy with most bytes on their way.

    Args:
        shared: bytes of shared memory that a block of the GPU may have.
    """
    cuts = candidates(n, k, bits, groups, shared, (2, 4) if groups == 1 else (2,))
    return tuple(sorted(cuts, key=lambda cut: rank(cut, n, k, multiprocessors)))


def candidates(
    n: int,
    k: int,
    bits: int,
    groups: int,
    shared: int,
    clusters: tuple[int, ...] = (1, 2, 4, 8),
    *,
    thorough: bool = False,
) -> Iterator[Cut]:
    """Cuts that suit a weight [n, k] and keep within a lane's registers. A block has a multiprocessor to itself, and
    `shared` bytes of shared memory at most.

    thorough: also half as many warps with twice the registers each, which are seldom better.
    """
    for cluster, warps, strips, depth in product(clusters, (16, 14, 8) if thorough else (16, 14), range(1, 10), (1, 2)):
        registers = strips * (depth * (6 if bits == 4 else 8) + groups * 4)
        if registers > (3 if warps == 8 else 1) * _REGISTERS[bits][groups]:
            continue
        for along in (1, 2, 4, 8, 16):
            if warps % along == 0:
                cut = Cut(strips, depth, warps // along, along, cluster, parts=2 if groups == 4 else 1)
                if cut.fits(n, k, bits, groups, shared):
                    yield cut


def rank(cut: Cut, n: int, k: int, multiprocessors: int) -> tuple[int, ...]:
    """By which cuts are sorted, the lowest first. Two blocks along the columns are best: more wait for each other
    longer, one reads more of x."""
    columns = k // 64
    rounds = -(-cut.blocks(n) // multiprocessors)
    of_block = -(-columns // cut.cluster)
    steps = -(-of_block // cut.along)
    # Tiles that the busiest multiprocessor computes, in tenths of an even share.
    work = 10 * rounds * cut.block_strips * steps * cut.along * multiprocessors // (n // 16 * columns)
    flight = min(64, cut.strips * cut.depth * cut.across * cut.along)
    return work + rounds + cut.cluster // 2, -flight, -cut.threads, cut.depth
