"""Slabs: the shapes of real models have one that covers the work evenly and fits a multiprocessor."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest

from deployments.engine.kernels import config
from deployments.engine.kernels.config import CUT_ROWS, cut_rows_of
from deployments.engine.kernels.cut import MOST_ROWS, SHARED_BYTES, Cut
from deployments.engine.kernels.slab import BLOCK_ROWS, PANEL, Slab, candidates, choose_slab, ranked_slabs
from tests.unit.engine.kernels.test_cut import LINEARS

ROWS = [rows for rows in CUT_ROWS if rows >= MOST_ROWS]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("n", "k"), LINEARS)
def test_the_chosen_slab_is_even_and_fits(n: int, k: int, bits: int) -> None:
    for rows in ROWS:
        slab = choose_slab(n, k, bits, rows, 132, SHARED_BYTES)
        assert slab is not None
        assert slab.fits(n, k, bits, SHARED_BYTES)
        assert slab.threads <= 1024
        assert slab.blocks(rows, n) * PANEL * slab.across * slab.rows >= n * rows * slab.cluster, "all has a block"
        rounds = -(-slab.blocks(rows, n) // 132)
        computed = rounds * slab.across * slab.rows * PANEL * 132 / slab.cluster
        assert computed <= 3 * n * max(rows, slab.rows), "of the multiprocessors at least a third is busy"


@pytest.mark.parametrize("bits", [4, 8])
def test_ranked_slabs_are_different_and_fit(bits: int) -> None:
    for rows in ROWS:
        found = ranked_slabs(6144, 4096, bits, rows, 132, SHARED_BYTES)
        assert set(found) == set(candidates(6144, 4096, bits, rows, SHARED_BYTES))
        assert len(set(found)) == len(found) > 5
        assert all(slab.registers(bits) * slab.threads <= 65536 for slab in found)
        assert {slab.rows for slab in found} == ({128, 256} if rows > 128 else {64, 128} if rows == 128 else {rows})


@pytest.mark.parametrize(("n", "k"), [(48, 64), (16, 4096)])
def test_small_weights_have_none(n: int, k: int) -> None:
    assert choose_slab(n, k, 4, 64, 132, SHARED_BYTES) is None, "a warpgroup would have more rows than the weight"


def test_little_shared_memory_leaves_none() -> None:
    assert choose_slab(4096, 4096, 4, 128, 132, 64 * 2**10) is None, "the table takes up to 64 KiB"
    slab = choose_slab(4096, 4096, 8, 32, 132, 64 * 2**10)
    assert slab is not None
    assert slab.shared_bytes(8) <= 64 * 2**10


@pytest.mark.parametrize("bits", [4, 8])
def test_a_ring_s_barriers_lie_behind_the_sums_too(bits: int) -> None:
    """They must not be overwritten: an arrival may be on its way when the sums are."""
    for across, along, rows, slots in product((1, 2, 3, 4), (1, 2, 4), BLOCK_ROWS, (4, 5, 6)):
        slab = Slab(rows, 2, across, along, slots=slots)
        ring, sums = slots * along * rows * 128, 4 * along * rows * (64 * across + 4)
        barriers = slab.shared_bytes(bits) - 16 * slots
        assert barriers >= sums
        assert barriers >= ring + (32 * 2**10 if bits == 4 else 0), "in front of it a table, and what aligns it"
    overlapped = Slab(128, 2, 4, slots=6, buffers=1)
    assert overlapped.shared_bytes(8) == 4 * 128 * 260 + 16 * 6, "of these sums are more than the ring"


def test_weights_beyond_the_kernel_s_offsets_have_none() -> None:
    slab = Slab(64, 4, 1)
    assert slab.fits(2**21 - 16, 4096, 4, SHARED_BYTES)
    assert not slab.fits(2**21, 4096, 4, SHARED_BYTES), "4 GiB"


def test_rows_have_the_next_entry() -> None:
    assert [cut_rows_of(rows) for rows in (1, 8, 9, 33, 64, 129, 2048)] == [8, 8, 16, 64, 64, 256, 2048]
    assert cut_rows_of(2049) is None


def test_tables_keep_both_kinds_of_cut() -> None:
    cuts: dict[int, Cut | Slab | None] = {8: Cut(1, 1, 4, 4), 64: Slab(64, 2, 2, cluster=2), 128: None}
    table = config.HEURISTIC.with_shape(
        "4bit", 64, 128, config.Entry(config.HEURISTIC.default["4bit"].configs, 0, cuts)
    )
    assert config.parse_table(json.loads(json.dumps(config.dump_table(table)))) == table


def test_shipped_slabs_fit() -> None:
    folder = Path(config.__file__).parent / "tables"
    shipped = [config.parse_table(json.loads(path.read_text(encoding="utf-8"))) for path in folder.glob("*.json")]
    slabs = [
        (kind, n, k, rows, slab)
        for table in shipped
        for (kind, n, k), entry in table.shapes.items()
        for rows, slab in entry.cuts.items()
        if isinstance(slab, Slab)
    ]
    assert slabs
    for kind, n, k, rows, slab in slabs:
        assert slab.fits(n, k, 4 if kind == "4bit" else 8, SHARED_BYTES)
        assert rows in ROWS
