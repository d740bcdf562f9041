"""Folders made once: by one of several processes, wholly or not at all."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from deployments.errors import ConfigError
from deployments.once import make_new, make_once

MAKER = """
import sys, time
from pathlib import Path
from deployments.once import make_once

target, log, go = map(Path, sys.argv[1:])

def make(folder):
    with log.open("a") as file:
        file.write("made\\n")
    time.sleep(0.3)
    (folder / "content").write_text("whole")

print("ready", flush=True)
while not go.exists():
    time.sleep(0.01)
print((make_once(target, make) / "content").read_text())
"""


def fill(folder: Path) -> None:
    (folder / "content").write_text("whole")


def never(folder: Path) -> None:
    pytest.fail(f"{folder} was made again")


def folders(parent: Path) -> list[str]:
    return sorted(path.name for path in parent.iterdir() if path.is_dir())


def test_is_made_once_with_its_parents(tmp_path: Path) -> None:
    target = tmp_path / "state" / "models" / "one"
    assert make_once(target, fill) == target
    assert (target / "content").read_text() == "whole"
    assert make_once(target, never) == target
    assert folders(target.parent) == ["one"]


def test_two_processes_at_once_make_it_once(tmp_path: Path) -> None:
    log, go = tmp_path / "log", tmp_path / "go"
    command = [sys.executable, "-c", MAKER, tmp_path / "target", log, go]
    pair = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in pair:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    go.touch()
    assert [process.communicate(timeout=20)[0] for process in pair] == ["whole\n", "whole\n"]
    assert log.read_text() == "made\n"
    assert folders(tmp_path) == ["target"]


def test_a_maker_that_raises_leaves_no_folder_and_may_try_again(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        fill(folder)
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        make_once(tmp_path / "target", fail)
    assert folders(tmp_path) == []
    make_once(tmp_path / "target", fill)
    assert folders(tmp_path) == ["target"]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    stale, others = tmp_path / ".target.123", [".target.v2.123", ".other.123", ".target.notes"]
    for name in (stale.name, *others):
        (tmp_path / name).mkdir()
        fill(tmp_path / name)
    make_once(tmp_path / "target", fill)
    assert folders(tmp_path) == sorted([*others, "target"])


def test_a_killed_maker_does_not_block_the_next(tmp_path: Path) -> None:
    go = tmp_path / "go"
    go.touch()
    slow = MAKER.replace("time.sleep(0.3)", "time.sleep(60)")
    with subprocess.Popen([sys.executable, "-c", slow, tmp_path / "target", tmp_path / "log", go]) as process:
        while not (tmp_path / "log").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    make_once(tmp_path / "target", fill)
    assert folders(tmp_path) == ["target"]


def test_a_parent_that_can_not_be_written_names_the_knob(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file can't be written \(.*\); set HEADROOM_HOME to a writable folder"):
        make_once(tmp_path / "file" / "target", never)


def test_a_new_folder_is_whole_and_alone(tmp_path: Path) -> None:
    make_new(tmp_path / "not yet" / "target", fill)
    assert [path.name for path in (tmp_path / "not yet").iterdir()] == ["target"]
    with pytest.raises(ConfigError, match="target is there already"):
        make_new(tmp_path / "not yet" / "target", never)


@pytest.mark.parametrize("kind", ["text", "tensors"])
def test_a_disk_that_is_full_is_told_in_one_line(kind: str, tmp_path: Path) -> None:
    """As far as a limit on the size of files is like one."""

    def write(folder: Path) -> None:
        if kind == "text":
            (folder / "content").write_bytes(bytes(2**21))
        save_file({"weight": torch.ones(2**19)}, folder / "model.safetensors")

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    try:
        with pytest.raises(ConfigError, match=r"target can't be written \(.+\); name a folder on a disk with room"):
            make_new(tmp_path / "target", write)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_a_new_folder_where_none_can_be_names_the_reason(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"target can't be written \(Not a directory\); name a folder"):
        make_new(tmp_path / "file" / "target", never)
