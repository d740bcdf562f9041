"""The benchmark of loading runs on the CPU, and judges what it measured; how fast is for the benchmark to say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import load_time
from benchmarks.checkpoint import write
from benchmarks.load_time import Found, Taken, loaded, main, read
from benchmarks.page_cache import drop, resident
from deployments.errors import ConfigError
from deployments.settings import PoolSettings

LINE = re.compile(
    r"bf16, .+: read in ([\d.]+) s \([\d.]+ GB/s\), loaded in ([\d.]+) s \([\d.]+ GB/s\): ([\d.]+) times(.*)"
)
DONE = re.compile(
    r"  (cold|page cache): (read|loaded) in ([\d.]+) s \([\d.]+ GB/s\), \d+ % of the files were cached before"
)


def found(load_s: float, *, cold: bool = True, shares: tuple[float, float] = (0.0, 0.0)) -> Found:
    """Files of 16 GB that are read in 4 s; `shares` of them are in the page cache before the read and the load."""
    reads = (Taken(5.0, shares[0]), Taken(4.0, shares[0]))
    return Found("nf4", cold, 16 * 10**9, reads, (Taken(load_s, shares[1]), Taken(load_s + 1, shares[1])))


@pytest.mark.parametrize(
    ("measured", "met", "line"),
    [
        (
            found(6.0),
            True,
            "nf4, cold: read in 4.00 s (4.00 GB/s), loaded in 6.00 s (2.67 GB/s): 1.50 times, goal 1.5: met",
        ),
        (
            found(6.4),
            False,
            "nf4, cold: read in 4.00 s (4.00 GB/s), loaded in 6.40 s (2.50 GB/s): 1.60 times, goal 1.5: missed",
        ),
        (
            found(4.0, shares=(0.0, 0.37)),
            False,
            "nf4, not shown to be cold (37 % of the files stayed in the page cache): read in 4.00 s (4.00 GB/s), "
            "loaded in 4.00 s (4.00 GB/s): 1.00 times, goal 1.5: not judged",
        ),
        (
            found(8.0, cold=False, shares=(1.0, 1.0)),
            True,
            "nf4, page cache: read in 4.00 s (4.00 GB/s), loaded in 8.00 s (2.00 GB/s): 2.00 times",
        ),
        (
            found(8.0, cold=False, shares=(1.0, 0.6)),
            True,
            "nf4, page cache (which had only 60 % of the files): read in 4.00 s (4.00 GB/s), "
            "loaded in 8.00 s (2.00 GB/s): 2.00 times",
        ),
    ],
)
def test_the_least_is_judged_where_the_files_were_cold(measured: Found, met: bool, line: str) -> None:
    assert str(measured) == line
    assert measured.met is met


def test_it_measures_cold_and_from_the_page_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["--shape", "tiny", "--quantization", "bf16", "--rounds", "1", "--folder", str(tmp_path)])

    printed = capsys.readouterr().out.splitlines()
    lines = [match for line in printed if (match := LINE.fullmatch(line))]
    assert ["goal" in line[4] for line in lines] == [True, False]
    assert all(float(line[2]) > float(line[1]) for line in lines), "a tiny model loads for longer than its files"
    assert status == 1
    done = [match.groups() for line in printed if (match := DONE.fullmatch(line))]
    assert [(where, what) for where, what, _ in done] == [
        ("page cache", "loaded"),  # which does not count
        ("cold", "read"),
        ("cold", "loaded"),
        ("page cache", "read"),
        ("page cache", "loaded"),
    ]
    assert [seconds for _, _, seconds in done[1:]] == [lines[0][1], lines[0][2], lines[1][1], lines[1][2]]


def test_files_are_read_whole_and_dropped_where_they_are_read_cold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_time, "_BLOCK_BYTES", 4096)
    monkeypatch.setattr(load_time, "resident", lambda files: 0.25 * len(files))
    dropped: list[Path] = []
    files = [tmp_path / "a", tmp_path / "b"]
    for path in files:
        path.write_bytes(bytes(2**23 + 1))  # more than is read ahead

    def dropping(paths: list[Path]) -> None:
        dropped.extend(paths)
        drop(paths)

    monkeypatch.setattr(load_time, "drop", dropping)
    assert read(files, cold=False).resident == 0.5
    assert dropped == []
    read(files, cold=True)
    assert dropped == files
    assert resident(files) == 1


def test_what_loads_from_a_copy_is_refused(tmp_path: Path) -> None:
    folder = write("tiny", tmp_path)
    with pytest.raises(ConfigError, match="nf4 is quantised once and read from a copy"):
        loaded(folder, PoolSettings(quantization="nf4", device="cpu"), cold=False)


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["--rounds", "0"], "argument --rounds: '0' is no whole number from 1 on"),
        (["--stages", "two"], "argument --stages: 'two' is no whole number from 1 on"),
        (["--quantization", "nf4,int3"], "argument --quantization: 'int3' is unknown; there are auto, nf4, fp4, int8"),
    ],
)
def test_what_can_not_be_measured_is_refused_before_anything_is_written(
    argv: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*argv, "--folder", str(tmp_path / "none")])
    assert ended.value.code == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
