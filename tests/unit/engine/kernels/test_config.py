"""Tables: shipped ones parse and are buildable, tuned ones come first, unknown GPUs get the heuristic."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from deployments.engine.kernels import config
from deployments.engine.kernels.config import (
    BUCKETS,
    HEURISTIC,
    HEURISTIC_BYTES,
    PARTIAL_BYTES,
    Entry,
    GemmConfig,
    Kind,
    Table,
)
from deployments.engine.kernels.cut import TABLE_BYTES
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


KIB = 2**10
L4, A100, H200 = 99 * KIB, 163 * KIB, 227 * KIB
"""Of shared memory for a block."""


def test_the_heuristic_takes_less_where_a_block_has_less_shared_memory() -> None:
    assert config.table_for("Some GPU of tomorrow", A100) is HEURISTIC
    small = config.table_for("Some GPU of tomorrow", L4)
    check(small)
    assert small.default["8bit"] == HEURISTIC.default["8bit"]
    changed = {
        rows for rows in BUCKETS if small.default["4bit"].configs[rows] != HEURISTIC.default["4bit"].configs[rows]
    }
    assert changed == {64, 128}


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton, which compiles for a GPU that is not there")
@pytest.mark.parametrize(("capability", "shared"), [(80, A100), (86, L4), (89, L4), (90, H200), (120, L4)])
def test_the_heuristic_fits_as_triton_lays_it_out(capability: int, shared: int) -> None:
    table = config.table_for("Some GPU of tomorrow", shared)
    for rows, choice in table.default["4bit"].configs.items():
        beside = dynamic_bytes(choice, rows, capability)
        # Of a kernel with a table of its own in shared memory, Triton raises the driver's limit for no less.
        assert 48 * KIB < beside <= shared - KIB - TABLE_BYTES, (rows, choice)
        assert beside + TABLE_BYTES <= HEURISTIC_BYTES


def dynamic_bytes(choice: GemmConfig, rows: int, capability: int) -> int:
    """Shared memory of the 4-bit kernel beside its table, with double quantisation, which takes most."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from deployments.engine.kernels.gemm import linear_4bit_kernel as kernel

    constants: dict[str, Any] = {
        "bias": None, "PER_SCALE": 1, "BM": rows, "STRIPS": choice.strips, "BLOCKS": choice.blocks,
        "STAGES": choice.stages, "ROUNDED": choice.rounded, "AHEAD": choice.ahead, "EVEN": True,
        "OVERLAP": choice.overlap, "PTX": True,
    }  # fmt: skip
    pointers = dict.fromkeys(("nested_absmax", "nested_code", "offset", "code", "partials"), "*fp32")
    pointers |= {"x": "*bf16", "out": "*bf16", "tiles": "*i32", "arrivals": "*i32", "absmax": "*u8"}
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
    divisible = {(names.index(name),): [["tt.divisibility", 16]] for name in (*pointers, "stride")}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, divisible)
    options = {"num_warps": choice.strips} | ({"maxnreg": choice.max_registers} if choice.max_registers else {})
    return int(compile(source, target=GPUTarget("cuda", capability, 32), options=options).metadata.shared)


def test_what_was_measured_is_not_cut_smaller(tmp_path: Path) -> None:
    measured = Entry({bucket: GemmConfig(8, 2, 4, 1) for bucket in BUCKETS}, 128)
    table = HEURISTIC.with_shape("4bit", 64, 128, measured)
    (tmp_path / config.file_name("NVIDIA L4")).write_text(json.dumps(config.dump_table(table)), encoding="utf-8")
    config.use_folder(tmp_path)
    mine = config.table_for("NVIDIA L4", L4)
    assert mine.entry("4bit", 64, 128) == measured
    assert mine.entry("4bit", 64, 64) == config.fitted(HEURISTIC, L4).default["4bit"]
    for path in SHIPPED:
        shipped = config.parse_table(json.loads(path.read_text(encoding="utf-8")))
        assert config.fitted(shipped, H200) == shipped


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
