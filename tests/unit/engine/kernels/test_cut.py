"""Cuts: the shapes of real models have one, it covers the work evenly, and it fits a multiprocessor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deployments.engine.kernels import config
from deployments.engine.kernels.cut import GROUPS, MOST_ROWS, SHARED_BYTES, Cut, candidates, choose_cut, groups_of

LINEARS = [
    (3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192),
    (6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336),
    (10240, 8192), (8192, 8192), (57344, 8192),
]  # fmt: skip
"""[n, k] of Llama 1B, 8B and 70B."""


def busiest(cut: Cut, n: int, k: int, multiprocessors: int) -> float:
    """Tiles of the busiest multiprocessor over an even share of them."""
    rounds = -(-cut.blocks(n) // multiprocessors)
    columns = -(-(k // 64) // cut.cluster)
    return rounds * cut.block_strips * columns * multiprocessors / (n // 16 * (k // 64))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("n", "k"), LINEARS)
def test_the_chosen_cut_is_even_and_fits(n: int, k: int, bits: int) -> None:
    for groups in GROUPS:
        cut = choose_cut(n, k, bits, groups, 132, SHARED_BYTES)
        if cut is None:
            assert groups > 1, "up to 8 rows there is always one"
            continue
        assert cut.fits(n, k, bits, groups, SHARED_BYTES)
        assert busiest(cut, n, k, 132) <= 1.25
        assert cut.blocks(n) * 16 * cut.block_strips >= n * cut.cluster, "every row has a block"


@pytest.mark.parametrize(("n", "k"), [(16, 64), (64, 64), (4096, 64)])
def test_small_weights_have_none(n: int, k: int) -> None:
    assert choose_cut(n, k, 4, 1, 132, SHARED_BYTES) is None, "a cut would have more strips or columns than the weight"


def test_x_that_does_not_fit_has_none() -> None:
    k = 1024 * 64
    assert not Cut(1, 1, 1, 16, 2).fits(4096, k, 4, 4, SHARED_BYTES)
    assert choose_cut(4096, k, 4, 4, 132, SHARED_BYTES) is None


def test_gpus_with_less_shared_memory_get_cuts_that_fit_it_or_none() -> None:
    less = 98 * 2**10  # of the 99 KiB of capability 12.x
    cut = choose_cut(6144, 4096, 4, 1, 188, less)
    assert cut is not None
    assert cut.shared_bytes(4096, 4, 1) <= less
    large = choose_cut(4096, 14336, 4, 1, 132, SHARED_BYTES)
    assert large is not None
    assert large.shared_bytes(14336, 4, 1) > less
    assert not large.fits(4096, 14336, 4, 1, less)
    assert choose_cut(4096, 14336, 4, 4, 188, less) is None, "x alone has more"
    for n, k in LINEARS:
        for groups in GROUPS:
            assert all(each.shared_bytes(k, 8, groups) <= less for each in candidates(n, k, 8, groups, less))


@pytest.mark.parametrize(("bits", "n"), [(4, 2**21), (8, 2**20)])
def test_weights_beyond_the_kernel_s_offsets_have_none(bits: int, n: int) -> None:
    cut = Cut(1, 1, 4, 4, 2)
    assert cut.fits(n - 16, 4096, bits, 1, SHARED_BYTES)
    assert not cut.fits(n, 4096, bits, 1, SHARED_BYTES), "4 GiB"


def test_candidates_are_different_and_fit() -> None:
    for bits in (4, 8):
        for groups in GROUPS:
            found = list(candidates(4096, 4096, bits, groups, SHARED_BYTES))
            assert len(set(found)) == len(found) > 10
            assert all(cut.shared_bytes(4096, bits, groups) <= SHARED_BYTES for cut in found)


@pytest.mark.parametrize(("rows", "groups"), [(1, 1), (8, 1), (9, 2), (16, 2), (17, 4), (MOST_ROWS, 4)])
def test_groups_of_rows(rows: int, groups: int) -> None:
    assert groups_of(rows) == groups


@pytest.mark.parametrize("path", sorted((Path(config.__file__).parent / "tables").glob("*.json")), ids=lambda p: p.stem)
def test_shipped_cuts_fit_their_shapes(path: Path) -> None:
    table = config.parse_table(json.loads(path.read_text(encoding="utf-8")))
    cuts = 0
    for (kind, n, k), entry in table.shapes.items():
        for rows, cut in entry.cuts.items():
            if isinstance(cut, Cut):
                assert cut.fits(n, k, int(kind.removesuffix("bit")), groups_of(rows), SHARED_BYTES), (kind, n, k, rows)
                cuts += 1
    assert cuts >= 15
