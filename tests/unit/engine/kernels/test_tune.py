"""Tuning by a fake timer: what is measured, kept, left for want of time, and shared by processes that tune at once."""

from __future__ import annotations

import itertools
import json
import logging
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from deployments.engine.kernels import config, tune
from deployments.engine.kernels.config import BUCKETS, HEURISTIC, Entry, GemmConfig, Kind, bucket_of
from deployments.engine.kernels.cut import SHARED_BYTES, Cut, choose_cut
from deployments.engine.kernels.modules import QuantLinear4, QuantLinear8
from deployments.engine.kernels.slab import Slab, choose_slab
from deployments.engine.kernels.timing import Weight
from deployments.engine.kernels.tune import CANDIDATES, Bench, tune_model, tuning_folder
from tests.unit.engine.kernels.test_modules import linear4, linear8

TOY = "Toy GPU"
FASTEST = {(kind, bucket): choices[-1] for (kind, bucket), choices in CANDIDATES.items()}


@pytest.fixture(autouse=True)
def no_folder() -> Iterator[None]:
    yield
    config._tuned.clear()
    config.table_for.cache_clear()


class Timer:
    """Counts what is measured. The last candidate is the fastest; dequantising is as fast as it at `crossover` rows."""

    def __init__(self, crossover: int = 64, broken: Callable[[GemmConfig, int], bool] = lambda _config, _rows: False):
        self.crossover, self.broken = crossover, broken
        self.measured: list[tuple[int, int, GemmConfig | None, int]] = []

    def microseconds(self, weights: Sequence[Weight], choice: GemmConfig | Cut | Slab | None, rows: int) -> float:
        assert not isinstance(choice, Cut)
        self.measured.append((weights[0].n, len(weights), choice, rows))
        if choice is None:
            return float(self.crossover)
        if self.broken(choice, rows):
            raise RuntimeError("out of resource: shared memory")
        kind: Kind = "4bit" if weights[0].n != 32 else "8bit"
        return rows + (0.0 if choice == FASTEST[kind, bucket_of(rows)] else 1000.0)

    def bench(self) -> Bench:
        ticks = itertools.count()
        return Bench(lambda _device: TOY, self.microseconds, lambda: float(next(ticks)))


def model(*shapes: tuple[int, int]) -> nn.Module:
    return nn.Sequential(*(QuantLinear4.of(linear4(n, k)) for n, k in shapes), QuantLinear8.of(linear8(32, 64)))


def test_every_new_shape_is_measured_once_and_kept(tmp_path: Path) -> None:
    net, timer = model((64, 128), (64, 128), (48, 64)), Timer()
    assert tune_model(net, tmp_path, bench=timer.bench()) == []
    table = config.table_for(TOY)
    for shape in (("4bit", 64, 128), ("4bit", 48, 64), ("8bit", 32, 64)):
        assert table.knows(*shape)
        entry = table.entry(*shape)
        assert entry.configs == {bucket: FASTEST[shape[0], bucket] for bucket in BUCKETS}
        assert entry.crossover == 64
    assert [n for n, _ in itertools.groupby(n for n, *_ in timer.measured)] == [64, 32, 48]  # most bytes first
    assert {weights for n, weights, *_ in timer.measured if n == 64} == {2}  # all of a shape in turn
    tried = sum(len(choices) for (kind, _), choices in CANDIDATES.items() if kind == "8bit")
    crossings = 2 * 4  # 16, 32 and 64 rows are faster, 128 are not: nothing larger is tried
    assert len([n for n, *_ in timer.measured if n == 32]) == tried + crossings
    again = Timer()
    tune_model(net, tmp_path, bench=again.bench())
    assert again.measured == []


def test_a_new_shape_completes_the_table(tmp_path: Path) -> None:
    tune_model(model((64, 128)), tmp_path, bench=Timer().bench())
    timer = Timer(crossover=16)
    tune_model(model((64, 128), (48, 64)), tmp_path, bench=timer.bench())
    assert {n for n, *_ in timer.measured} == {48}
    table = config.table_for(TOY)
    assert (table.entry("4bit", 48, 64).crossover, table.entry("4bit", 64, 128).crossover) == (16, 64)


def test_shapes_of_a_shipped_table_are_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "_SHIPPED", tmp_path / "shipped")
    (tmp_path / "shipped").mkdir()
    shipped = HEURISTIC.with_shape("4bit", 64, 128, Entry(HEURISTIC.default["4bit"].configs, 32))
    tune.write_table(shipped, tmp_path / "shipped" / config.file_name(TOY))
    timer = Timer()
    tune_model(model((64, 128)), tmp_path / "own", bench=timer.bench())
    assert {n for n, *_ in timer.measured} == {32}
    assert config.table_for(TOY).entry("4bit", 64, 128).crossover == 32  # the own table holds the shipped one


def test_weights_without_tiles_are_not_measured(tmp_path: Path) -> None:
    timer = Timer()
    net = nn.Sequential(QuantLinear4.of(linear4(24, 96)))
    assert tune_model(net, tmp_path, bench=timer.bench()) == []
    assert timer.measured == []
    assert not (tmp_path / config.file_name(TOY)).exists()


def test_each_gpu_has_a_table_of_its_own(tmp_path: Path) -> None:
    timer = Timer()
    devices = {torch.device("cpu"): "Toy GPU", torch.device("meta"): "Other GPU"}
    net = nn.Sequential(QuantLinear4.of(linear4(64, 128)), QuantLinear4.of(linear4(48, 64)).to("meta"))
    bench = timer.bench()
    tune_model(net, tmp_path, bench=Bench(devices.__getitem__, bench.microseconds, bench.clock))
    assert config.table_for("Toy GPU").shapes.keys() == {("4bit", 64, 128)}
    assert config.table_for("Other GPU").shapes.keys() == {("4bit", 48, 64)}


# What does not run


@pytest.mark.parametrize(("from_bucket", "crossover"), [(16, 0), (64, 32), (128, 64)])
def test_where_nothing_runs_weights_are_dequantised(
    from_bucket: int, crossover: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    timer = Timer(crossover=10**6, broken=lambda _, rows: rows >= from_bucket)
    with caplog.at_level(logging.WARNING):
        assert tune_model(nn.Sequential(QuantLinear4.of(linear4(64, 128))), tmp_path, bench=timer.bench()) == []
    entry = config.table_for(TOY).entry("4bit", 64, 128)
    assert entry.crossover == crossover
    assert set(entry.configs) == set(BUCKETS)
    assert f"no 4bit configuration for {from_bucket} rows runs here" in caplog.text


def test_one_that_does_not_run_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    best = FASTEST["4bit", 32]
    timer = Timer(broken=lambda choice, _: choice == best)
    with caplog.at_level(logging.INFO):
        tune_model(nn.Sequential(QuantLinear4.of(linear4(64, 128))), tmp_path, bench=timer.bench())
    configs = config.table_for(TOY).entry("4bit", 64, 128).configs
    assert configs[32] == CANDIDATES["4bit", 32][0]
    assert configs[64] == FASTEST["4bit", 64]
    assert "does not run here: out of resource: shared memory" in caplog.text


# Cuts

CUTS = tuple(Cut(1, 1, 4, 4, cluster) for cluster in (1, 2, 4))


class CutTimer(Timer):
    """`Timer`, and cuts: the first takes as long as `best` says, each further one ten microseconds more."""

    def __init__(self, best: float, **options: Any) -> None:
        super().__init__(**options)
        self.best = best

    def microseconds(self, weights: Sequence[Weight], choice: GemmConfig | Cut | Slab | None, rows: int) -> float:
        if not isinstance(choice, Cut):
            return super().microseconds(weights, choice, rows)
        if choice == CUTS[0]:
            raise RuntimeError("the driver refuses it")
        return self.best + 10 * CUTS.index(choice)

    def bench(self) -> Bench:
        return replace(super().bench(), cuts=lambda _weight, rows: CUTS if rows < 32 else ())


def tuned_cuts(timer: Timer, folder: Path) -> dict[int, Cut | Slab | None]:
    """As they are read back from the disk."""
    assert tune_model(nn.Sequential(QuantLinear4.of(linear4(64, 128))), folder, bench=timer.bench()) == []
    kept = json.loads((folder / config.file_name(TOY)).read_text(encoding="utf-8"))
    entry = config.parse_table(kept).entry("4bit", 64, 128)
    assert entry == config.table_for(TOY).entry("4bit", 64, 128)
    return dict(entry.cuts)


def test_the_fastest_cut_that_runs_is_kept_where_it_beats_the_other_kernel(tmp_path: Path) -> None:
    """The other takes as many microseconds as there are rows: 8 and 16."""
    assert tuned_cuts(CutTimer(best=-5.0), tmp_path / "faster") == {8: CUTS[1], 16: CUTS[1]}
    assert tuned_cuts(CutTimer(best=0.0), tmp_path / "between") == {8: None, 16: CUTS[1]}
    assert tuned_cuts(CutTimer(best=90.0), tmp_path / "slower") == {8: None, 16: None}
    assert tuned_cuts(Timer(), tmp_path / "none") == {}


def test_where_no_other_kernel_runs_the_fastest_cut_is_kept(tmp_path: Path) -> None:
    timer = CutTimer(best=90.0, crossover=10**6, broken=lambda _config, _rows: True)
    assert tuned_cuts(timer, tmp_path) == {8: CUTS[1], 16: CUTS[1]}


def test_so_many_cuts_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = ModuleType("launch")  # the real one imports Triton
    found = {"clusters": True, "warpgroups": True, "multiprocessors": 132, "shared_bytes": SHARED_BYTES}
    for name, value in found.items():
        setattr(launch, name, lambda _device, value=value: value)
    monkeypatch.setitem(sys.modules, "deployments.engine.kernels.launch", launch)
    weight = QuantLinear4.of(linear4(2048, 2048)).quantised
    cuts = tune.cuts_of(weight, 1)
    assert len(set(cuts)) == tune._MOST_CUTS
    assert cuts[0] == choose_cut(2048, 2048, 4, 1, 132, SHARED_BYTES)
    both = tune.cuts_of(weight, 32)
    assert [type(cut) for cut in both] == [Cut] * tune._MOST_CUTS + [Slab] * tune._MOST_SLABS
    slabs = tune.cuts_of(weight, 64)
    assert slabs[0] == choose_slab(2048, 2048, 4, 64, 132, SHARED_BYTES)
    assert {type(slab) for slab in slabs} == {Slab}
    monkeypatch.setattr(launch, "warpgroups", lambda _device: False)
    assert tune.cuts_of(weight, 64) == []
    monkeypatch.setattr(launch, "clusters", lambda _device: False)
    assert tune.cuts_of(weight, 1) == ()


# The limit


def test_the_limit_ends_it_and_the_next_start_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    net = model((64, 128), (48, 64))
    first = sum(len(choices) for (kind, _), choices in CANDIDATES.items() if kind == "4bit") + 2 * 4
    timer = Timer()
    with caplog.at_level(logging.INFO):
        left = tune_model(net, tmp_path, limit_s=first + 10, bench=timer.bench())
    assert left == [("8bit", 32, 64), ("4bit", 48, 64)]
    assert len(timer.measured) < first + 10
    assert "tuning 4bit 64x128 for Toy GPU: shape 1 of 3" in caplog.text
    assert "with 1 of 3 shapes measured; 8bit 32x64, 4bit 48x64 run in the default configuration" in caplog.text
    table = config.table_for(TOY)
    assert table.knows("4bit", 64, 128)
    assert table.entry("4bit", 48, 64) == HEURISTIC.default["4bit"]
    rest = Timer()
    assert tune_model(net, tmp_path, bench=rest.bench()) == []
    assert {n for n, *_ in rest.measured} == {32, 48}


# The files


def test_processes_that_tune_at_once_lose_nothing(tmp_path: Path) -> None:
    """Each adds to what the others have written, though all began from the same table."""
    path = tmp_path / config.file_name(TOY)
    entry = Entry(HEURISTIC.default["4bit"].configs, 64)

    def add(first: int) -> None:
        for n in range(first, first + 8):
            tune.keep(path, HEURISTIC, ("4bit", 16 * n, 64), entry)

    threads = [threading.Thread(target=add, args=(8 * i + 1,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    table = config.parse_table(json.loads(path.read_text(encoding="utf-8")))
    assert {n for _, n, _ in table.shapes} == {16 * n for n in range(1, 33)}
    assert sorted(each.suffix for each in tmp_path.iterdir()) == [".json", ".lock"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"4bit": {"64x128": {"configs": {"16": {"warps": 3}}}}}'])
def test_a_damaged_table_is_measured_again(text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / config.file_name(TOY)
    path.write_text(text, encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        assert tune_model(model((64, 128)), tmp_path, bench=Timer().bench()) == []
    assert "is damaged" in caplog.text
    assert config.table_for(TOY).knows("4bit", 64, 128)


def test_without_a_place_to_keep_them_nothing_is_measured(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    timer = Timer()
    with caplog.at_level(logging.WARNING):
        left = tune_model(model((64, 128)), tmp_path / "file" / "kernels", bench=timer.bench())
    assert left == [("4bit", 64, 128), ("8bit", 32, 64)]
    assert timer.measured == []
    assert "kernels are not tuned" in caplog.text
    assert "set HEADROOM_HOME" in caplog.text


def test_tables_of_other_versions_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tuning_folder(tmp_path)
    assert here == tuning_folder(tmp_path)
    versions: dict[str, Any] = {"torch": "9.9", "triton": "8.8"}
    monkeypatch.setattr(tune, "version", versions.__getitem__)
    there = tuning_folder(tmp_path)
    assert there.name.startswith("torch-9.9-triton-8.8-")
    assert there != here
    versions["triton"] = "8.9"
    assert tuning_folder(tmp_path) != there
