"""How a product of tens to hundreds of rows is divided among the warpgroups and blocks of a GPU. Integers only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product

PANEL = 64
"""Rows of the weight that a warpgroup computes: those of its matrix instruction."""
TABLE_BYTES = 32 * 2**10
"""All pairs of 4-bit weights, a copy for each lane. The table begins at a multiple of its size."""
BLOCK_ROWS = (32, 64, 128, 256)
"""Rows of x that a block may compute."""
_CLUSTERS = (1, 2)
"""Larger ones leave multiprocessors idle, whose number their groups are no multiples of."""
_REGISTERS = 65536
"""Of a multiprocessor."""
_OFFSETS = 2**32
"""The kernel counts a weight's bytes in 32 bits."""


@dataclass(frozen=True, slots=True)
class Slab:
    """The kernel's compile-time constants that divide the work; `wide.cu` explains them."""

    rows: int
    """Rows of x that a block computes: one of `BLOCK_ROWS`."""
    depth: int
    """64-column blocks that a warp reads ahead: 2 or 4."""
    across: int
    """Warpgroups of a block side by side, each over `PANEL` rows of the weight."""
    along: int = 1
    """Warpgroups of a block along the columns."""
    cluster: int = 1
    """Blocks along the columns."""
    slots: int = 4
    """Of the ring that x comes through: 3 to 6."""
    buffers: int = 2
    """Of looked-up weights: 1 or 2."""

    @property
    def threads(self) -> int:
        """Of a block."""
        return 128 * self.across * self.along

    def blocks(self, rows: int, n: int) -> int:
        """For x of so many rows and a weight of n."""
        return -(-n // (PANEL * self.across)) * -(-rows // self.rows) * self.cluster

    def shared_bytes(self, bits: int) -> int:
        """The table, what lies before it and the ring, or the sums at the end, whichever is larger, and behind both the
        ring's barriers."""
        inputs = (2 * TABLE_BYTES if bits == 4 else 2**10) + self.slots * self.along * self.rows * 128
        return max(inputs, 4 * self.along * self.rows * (PANEL * self.across + 4)) + 16 * self.slots

    def registers(self, bits: int) -> int:
        """Of a lane, about: sums, looked-up weights, weights on their way, and addresses."""
        return self.rows // 2 + 16 * self.buffers + self.depth * (6 if bits == 4 else 8) + 32

    def macros(self) -> dict[str, int]:
        """For the compiler."""
        return {name.upper(): value for name, value in asdict(self).items()} | {"THREADS": self.threads}

    def fits(self, n: int, k: int, bits: int, shared: int) -> bool:
        """Whether the kernel can compute a weight [n, k] so, in blocks of at most `shared` bytes of shared memory."""
        enough = n >= PANEL * self.across and k // 64 >= self.cluster
        return enough and n * k * bits // 8 < _OFFSETS and self.shared_bytes(bits) <= shared


def choose_slab(n: int, k: int, bits: int, rows: int, multiprocessors: int, shared: int) -> Slab | None:
    """The best of `ranked_slabs`, for a shape that was not measured. None where there is none."""
    return next(iter(ranked_slabs(n, k, bits, rows, multiprocessors, shared)), None)


@cache
def ranked_slabs(n: int, k: int, bits: int, rows: int, multiprocessors: int, shared: int) -> tuple[Slab, ...]:
    """Those first that keep all multiprocessors equally busy, for so many rows of x.

    Args:
        shared: bytes of shared memory that a block of the GPU may have.
    """
    return tuple(sorted(candidates(n, k, bits, rows, shared), key=lambda slab: rank(slab, n, k, rows, multiprocessors)))


def candidates(n: int, k: int, bits: int, rows: int, shared: int) -> Iterator[Slab]:
    """Slabs that suit a weight [n, k] and keep within a lane's registers. A block has a multiprocessor to itself, and
    `shared` bytes of shared memory at most."""
    fitting = next((size for size in BLOCK_ROWS if rows <= size), BLOCK_ROWS[-1])
    sizes = (fitting, fitting // 2) if fitting >= 128 else (fitting,)
    for size, across, along, cluster in product(sizes, (1, 2, 3, 4), (1, 2, 4), _CLUSTERS):
        for depth, buffers, slots in product((4, 2), (2, 1), (6, 5, 4)):
            slab = Slab(size, depth, across, along, cluster, slots, buffers)
            if slab.fits(n, k, bits, shared) and slab.registers(bits) <= min(255, _REGISTERS // slab.threads):
                yield slab
                break  # the others would have less on its way


def rank(slab: Slab, n: int, k: int, rows: int, multiprocessors: int) -> tuple[int, ...]:
    """By which slabs are sorted, the lowest first."""
    columns = k // 64
    rounds = -(-slab.blocks(rows, n) // multiprocessors)
    of_block = -(-columns // slab.cluster)
    steps = -(-of_block // (slab.along * slab.depth)) * slab.depth
    groups = slab.across * slab.along
    # What the busiest multiprocessor computes, in hundredths of an even share. A step of so many rows takes as long as
    # looking up its weights, which is as long as 88 rows.
    work = 100 * rounds * groups * steps * (slab.rows + 88) * multiprocessors // (-(-n // PANEL) * columns * rows)
    return work + 20 * (rounds - 1) - 20 * min(groups, 4) * (slab.rows + 88) // rows, -groups, slab.cluster, slab.along
