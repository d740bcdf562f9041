"""What the kernel says of its page cache is what was done to it."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest

from benchmarks.page_cache import drop, resident


def test_the_share_is_of_all_files(tmp_path: Path) -> None:
    paths = [tmp_path / "one", tmp_path / "three"]
    for path, pages in zip(paths, (1, 3), strict=True):
        path.write_bytes(bytes(pages * mmap.PAGESIZE - 1))
    assert resident(paths) == 1
    drop(paths[:1])
    if resident(paths[:1]) == 1:
        pytest.skip("this file system keeps its pages")
    assert resident(paths) == 0.75
    assert len(paths[0].read_bytes()) == mmap.PAGESIZE - 1
    assert resident(paths) == 1
