"""Tables: shipped ones parse and are buildable, tuned ones come first, unknown GPUs get the heuristic."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from deployments.engine.kernels import config
from deployments.engine.kernels.config import BUCKETS, HEURISTIC, PARTIAL_BYTES, Entry, GemmConfig, Kind, Table
from deployments.engine.kernels.tune import CANDIDATES

KINDS: tuple[Kind, Kind] = ("4bit", "8bit")
SHIPPED = sorted((Path(config.__file__).parent / "tables").glob("*.json"))


@pytest.fixture(autouse=True)
def no_folder() -> Iterator[None]:
    yield
    config._tuned.clear()
    config.table_for.cache_clear()


def fits(choice: GemmConfig, bucket: int) -> bool:
    """Partial sums of 132 multiprocessors in the workspace."""
    return 2 * 132 * choice.per_multiprocessor * choice.panel_rows * bucket * 4 <= PARTIAL_BYTES


def check(table: Table) -> None:
    for entry in (*table.default.values(), *table.shapes.values()):
        assert set(entry.configs) == set(BUCKETS)
        assert all(fits(choice, bucket) for bucket, choice in entry.configs.items())


def test_heuristic_is_complete() -> None:
    check(HEURISTIC)
    assert config.table_for("Some GPU of tomorrow") is HEURISTIC


def test_candidates_fit() -> None:
    assert {bucket for _, bucket in CANDIDATES} == set(BUCKETS)
    for (_, bucket), choices in CANDIDATES.items():
        assert len(set(choices)) == len(choices)
        assert all(fits(choice, bucket) for choice in choices)


@pytest.mark.parametrize("path", SHIPPED, ids=[path.stem for path in SHIPPED])
def test_shipped_tables(path: Path) -> None:
    table = config.parse_table(json.loads(path.read_text(encoding="utf-8")))
    check(table)
    assert config.parse_table(config.dump_table(table)) == table


def test_a_tuned_table_comes_first(tmp_path: Path) -> None:
    mine = HEURISTIC.with_shape("4bit", 64, 128, Entry({bucket: GemmConfig(4, 1, 2, 1) for bucket in BUCKETS}, 96))
    (tmp_path / config.file_name("NVIDIA H200")).write_text(json.dumps(config.dump_table(mine)), encoding="utf-8")
    config.use_folder(tmp_path)
    table = config.table_for("NVIDIA H200")
    assert table == mine
    assert table.knows("4bit", 64, 128)
    assert table.entry("4bit", 64, 128).crossover == 96
    assert table.entry("4bit", 64, 64) == HEURISTIC.default["4bit"]


@pytest.mark.parametrize(("rows", "bucket"), [(1, 16), (16, 16), (17, 32), (64, 64), (128, 128), (1000, 128)])
def test_buckets(rows: int, bucket: int) -> None:
    assert config.bucket_of(rows) == bucket
