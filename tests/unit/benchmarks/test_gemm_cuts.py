"""Which cuts the benchmark writes into a table."""

from __future__ import annotations

from benchmarks.gemm_cuts import _best, with_cuts
from deployments.engine.kernels.config import HEURISTIC, Entry, dump_table, parse_table
from deployments.engine.kernels.cut import Cut

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
