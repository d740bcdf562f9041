"""What the machine says, read from files that a test wrote."""

from __future__ import annotations

from pathlib import Path

import pytest

from placement import probe
from placement.errors import PlacementError


def test_available_memory_is_bounded_by_the_container(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  3000 kB\nMemAvailable:   2000 kB\nHugePages_Total: 0\n")
    assert probe.available_memory(meminfo, tmp_path) == 2000 * 1024
    (tmp_path / "memory.max").write_text("1500000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    assert probe.available_memory(meminfo, tmp_path) == 1_100_000
    (tmp_path / "memory.max").write_text("max\n")
    assert probe.available_memory(meminfo, tmp_path) == 2000 * 1024


def test_a_system_that_does_not_say(tmp_path: Path) -> None:
    with pytest.raises(PlacementError, match="give sizes by hand"):
        probe.available_memory(tmp_path / "none", tmp_path)
    assert probe.computes_bf16_natively(tmp_path / "none") is False


@pytest.mark.parametrize(("flags", "native"), [("fpu avx512_bf16 sse", True), ("amx_bf16", True), ("avx512f", False)])
def test_bf16_flag(tmp_path: Path, flags: str, native: bool) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {flags}\n\nprocessor\t: 1\nflags\t\t: {flags}\n")
    assert probe.computes_bf16_natively(cpuinfo) is native


def test_this_machine() -> None:
    node = probe.inventory().nodes[0]
    assert node.cpus >= 1
    assert node.memory_bytes > 0
