"""A checkpoint's files are read ahead of the load; whatever goes wrong there is not the load's concern."""

from __future__ import annotations

import logging
import re
import time
from pathlib import Path
from threading import Barrier, Event

import pytest

from deployments.engine import read_ahead
from deployments.engine.read_ahead import read_through, reading_ahead, worth_reading
from placement.errors import PlacementError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files of weights, 10 and 5 kB, which are read in blocks of 4 kB, and one that isn't read."""
    (tmp_path / "model-1.safetensors").write_bytes(bytes(10_000))
    (tmp_path / "model-2.safetensors").write_bytes(bytes(5_000))
    (tmp_path / "tokenizer.json").write_bytes(bytes(1_000))
    return tmp_path


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(read_ahead, "BLOCK_BYTES", 4_000)
    caplog.set_level(logging.INFO, read_ahead.__name__)


class Polled(Event):
    """Set once it was asked so many times."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.left = times

    def is_set(self) -> bool:
        self.left -= 1
        return self.left < 0


@pytest.mark.parametrize(("size", "available", "worth"), [(50, 100, True), (51, 100, False), (16, 0, False)])
def test_files_may_take_half_of_the_memory_that_is_available(size: int, available: int, worth: bool) -> None:
    assert worth_reading(size, available) is worth


@pytest.mark.parametrize("readers", [1, 4])
def test_files_are_read_whole(folder: Path, readers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "READERS", readers)
    assert read_through(sorted(folder.glob("*.safetensors")), Event()) == 15_000


def test_several_blocks_are_read_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meeting = Barrier(2)

    def read(path: Path, start: int, buffer: memoryview) -> int:
        del path
        if start == 0:  # of each of the two files
            meeting.wait(timeout=10)
        return len(buffer)

    monkeypatch.setattr(read_ahead, "READERS", 2)
    monkeypatch.setattr(read_ahead, "BLOCK_BYTES", 10_000)
    monkeypatch.setattr(read_ahead, "_read_block", read)
    assert read_through(sorted(folder.glob("*.safetensors")), Event()) == 20_000


def test_what_one_reader_fails_at_ends_the_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []

    def read(path: Path, start: int, buffer: memoryview) -> int:
        del path, buffer
        begun.append(start)
        if start == 0:
            raise OSError("the disk is gone")
        time.sleep(0.05)
        return 1

    monkeypatch.setattr(read_ahead, "READERS", 2)
    monkeypatch.setattr(read_ahead, "BLOCK_BYTES", 100)
    monkeypatch.setattr(read_ahead, "_read_block", read)
    with pytest.raises(OSError, match="the disk is gone"):
        read_through([folder / "model-1.safetensors"], Event())
    assert len(begun) < 10, "of a hundred blocks"


def test_a_folder_in_place_of_a_file_is_an_error(folder: Path) -> None:
    with pytest.raises(IsADirectoryError):
        read_through([folder / "model-1.safetensors", folder], Event())


def test_files_are_read_until_the_load_ends(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "READERS", 1)
    files = sorted(folder.glob("*.safetensors"))
    assert read_through(files, Polled(2)) == 8_000
    assert read_through(files, Polled(0)) == 0


def test_the_checkpoints_weights_are_read_beside_the_load(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with reading_ahead(folder):
        pass
    (line,) = caplog.messages
    assert re.fullmatch(r"read ahead of the load: (0 B|[\d.]+ kB) of 15\.0 kB in \d+\.\d s", line)


def test_files_of_more_than_half_of_the_memory_are_not_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(read_ahead, "available_memory", lambda: 29_999)
    monkeypatch.setattr(read_ahead, "read_through", None)
    with reading_ahead(folder):
        pass
    assert caplog.messages == [
        "files of 15.0 kB are not read ahead of the load: that is more than half of the main memory available, 30.0 kB"
    ]


def unreadable(*_: object) -> int:
    raise OSError("the disk is gone")


def unknown() -> int:
    raise PlacementError("no idea how much")


@pytest.mark.parametrize(
    ("name", "fails", "reason"),
    [("read_through", unreadable, "the disk is gone"), ("available_memory", unknown, "no idea how much")],
)
def test_what_goes_wrong_is_logged_alone(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
    fails: object,
    reason: str,
) -> None:
    monkeypatch.setattr(read_ahead, name, fails)
    with reading_ahead(folder):
        pass
    assert caplog.messages == [f"files are not read ahead of the load: {reason}"]


def test_a_folder_without_weights_is_for_the_load_to_refuse(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with reading_ahead(tmp_path):
        pass
    assert "*.safetensors is needed" in caplog.text
