"""Which cuts the benchmark writes into a table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from benchmarks.gemm_cuts import Wanted, _best, add_to, first_cuts, first_slabs, with_cuts
from benchmarks.gemm_report import SHAPES
from deployments.engine.kernels.config import CUT_ROWS, HEURISTIC, Entry, Kind, dump_table, parse_table
from deployments.engine.kernels.cut import Cut, choose_cut, groups_of
from deployments.engine.kernels.slab import Slab, choose_slab
from deployments.engine.kernels.tune import write_table

H200 = 132, 226 * 2**10
"""Multiprocessors, and bytes of shared memory that a block may have."""

ONE, TWO, FOUR = (Cut(1, 1, 4, 4, cluster) for cluster in (1, 2, 4))


def test_the_best_is_that_of_the_least_sum_of_ratios() -> None:
    few, more = {ONE: 1.0, TWO: 1.2}, {ONE: 20.0, TWO: 10.0, FOUR: 1.0}
    assert _best([(few, 5.0)]) == ONE
    assert _best([(few, 5.0), ({ONE: 20.0, TWO: 10.0}, 30.0)]) == TWO
    assert _best([(few, 5.0), (more, 30.0)]) == TWO, "one that was right for some rows only is not taken"


def test_none_where_the_other_kernel_is_faster_or_no_cut_was_right() -> None:
    assert _best([({ONE: 3.0}, 2.0)]) is None
    assert _best([({ONE: 3.0}, 2.0), ({ONE: 3.0}, 5.0)]) == ONE, "by the sum"
    assert _best([({}, 2.0)]) is None
    assert _best([({ONE: 1.0}, 2.0), ({TWO: 1.0}, 2.0)]) is None


def test_a_table_gets_the_cuts_of_each_shape_and_keeps_the_rest() -> None:
    configs = HEURISTIC.default["4bit"].configs
    table = HEURISTIC.with_shape("4bit", 64, 128, Entry(configs, 32, {16: FOUR, 32: FOUR}))
    found = {
        ("4bit", 64, 128, 1): ({ONE: 1.0, TWO: 1.5}, 9.0),
        ("4bit", 64, 128, 8): ({ONE: 4.0, TWO: 2.0}, 9.0),
        ("4bit", 64, 128, 16): ({ONE: 9.0}, 1.0),
        ("8bit", 64, 128, 1): ({TWO: 1.0}, 9.0),
    }
    filled = with_cuts(table, found)
    assert filled.entry("4bit", 64, 128) == Entry(configs, 32, {8: TWO, 16: None, 32: FOUR})
    assert filled.entry("8bit", 64, 128).cuts == {8: TWO}
    assert filled.shapes.keys() == {("4bit", 64, 128), ("8bit", 64, 128)}
    assert parse_table(dump_table(filled)) == filled


def test_a_table_is_added_to_in_its_file(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    write_table(HEURISTIC, path)
    slab = Slab(64, 4, 3, 1, 2)
    add_to(path, {("4bit", 3072, 2048, 64): ({slab: 1.0}, 9.0)})
    add_to(path, {("4bit", 2048, 2048, 8): ({ONE: 1.0}, 9.0)})
    table = parse_table(json.loads(path.read_text()))
    assert table.entry("4bit", 3072, 2048).cuts == {64: slab}
    assert table.entry("4bit", 2048, 2048).cuts == {8: ONE}


def test_the_first_of_all_cuts_hold_what_an_unmeasured_shape_gets() -> None:
    kinds: tuple[tuple[Kind, int], ...] = (("4bit", 4), ("8bit", 8))
    for name, (n, k) in (
        (f"{model} {name}", shape) for model, linears in SHAPES.items() for name, shape in linears.items()
    ):
        for kind, bits in kinds:
            for rows in CUT_ROWS:
                wanted = Wanted(name, kind, n, k, rows, 16)
                if rows <= 32:
                    cuts = first_cuts(wanted, *H200)
                    assert len(cuts) <= 16
                    assert set(cuts) <= set(first_cuts(replace(wanted, most=None), *H200))
                    chosen = choose_cut(n, k, bits, groups_of(rows), *H200)
                    assert chosen is None or chosen in cuts
                if rows >= 32:
                    assert choose_slab(n, k, bits, rows, *H200) == first_slabs(wanted, *H200)[0]
