"""What FlashInfer's kernels fit, the memory they are given, and which of their modes decodes take."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.engine import flashinfer_fit
from deployments.engine.attention_tables import Shape
from deployments.engine.flashinfer_fit import VERSION, Kind, Room, fills, why_not, why_not_here

BF16, FP16, FP8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn
LLAMA = Kind(32, 8, 128, BF16, BF16, None, None)
H200_SMS = 132


@pytest.mark.parametrize(
    "kind",
    [
        LLAMA,
        replace(LLAMA, kv_dtype=FP8),
        replace(LLAMA, head_dim=256, kv_dtype=FP8, window=9, softcap=50.0),
        replace(LLAMA, head_dim=64, dtype=FP16, kv_dtype=FP16),
        replace(LLAMA, heads=64, kv_heads=64),
    ],
)
def test_fits(kind: Kind) -> None:
    assert why_not(kind) is None


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (replace(LLAMA, dtype=torch.float32), "16 bits, not float32"),
        (
            replace(LLAMA, kv_dtype=FP16),
            "beside bfloat16 its kernels read KV in bfloat16 or float8_e4m3fn, not float16",
        ),
        (replace(LLAMA, head_dim=80), "bfloat16 KV with heads of 64, 128, 256, not of 80"),
        (replace(LLAMA, head_dim=64, kv_dtype=FP8), "float8_e4m3fn KV with heads of 128, 256, not of 64"),
        (replace(LLAMA, heads=12), "12 query heads do not share 8 KV heads evenly"),
        (replace(LLAMA, heads=71, kv_heads=71), "71 KV heads of size 128"),
    ],
)
def test_does_not_fit(kind: Kind, reason: str) -> None:
    assert reason in (why_not(kind) or "")


def test_the_machine_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    installed = {"version": "0.6.13"}
    monkeypatch.setattr(flashinfer_fit, "version", lambda _: installed["version"])
    monkeypatch.setattr(flashinfer_fit, "find_spec", lambda _: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: ((8, 0), (7, 5))[i])
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert why_not_here() == f"flashinfer-python 0.6.13 is installed, and {VERSION} is what Headroom calls"
    installed["version"] = VERSION
    assert "no nvcc is on PATH or in CUDA_HOME" in (why_not_here() or "")
    compiler = tmp_path / "bin" / "nvcc"
    compiler.parent.mkdir()
    compiler.touch()
    assert why_not_here() == "GPU 1 is older than Ampere"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert why_not_here() is None


def test_a_machine_without_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(flashinfer_fit, "version", missing)
    assert why_not_here() == f"flashinfer-python=={VERSION} is not installed"


def taken(kind: Kind, sms: int, queries: list[int], pages: list[int], block_size: int, graph: bool) -> tuple[int, int]:
    """(floats, ints) that a tensor-core plan takes, after the sizes in FlashInfer's `PrefillPlan`."""
    group, limit, rows = kind.group, max(1, 2 * sms // kind.kv_heads), sum(queries)
    average = group if graph else group * rows // len(queries)
    tile = (128 if average > 64 and kind.head_dim < 256 else 64) if average > 16 else 16
    tiles = [-(-q * group // tile) for q in queries]

    def parts(pages_each: int) -> int:
        return sum(t * -(-p // pages_each) for t, p in zip(tiles, pages, strict=True))

    low = max(1, 128 // block_size)
    while low < max(pages) and parts(low) > limit:
        low += 1
    split = graph or low < max(pages)
    ctas = max(limit, -(-rows * group // tile) + len(queries) - 1) if graph else parts(low)
    ints = 13 * ctas + 4 * (len(queries) + 1) + 4 * (rows + 1) + 8 + 8 * 16
    return (kind.heads * ctas * tile * (kind.head_dim + 1) * 4 + 32 if split else 0), ints


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_the_room_suffices(data: st.DataObject) -> None:
    kv_heads = data.draw(st.sampled_from((1, 2, 8, 16)))
    group = data.draw(st.sampled_from((1, 2, 4, 7, 8, 32, 71)))
    kind = replace(
        LLAMA, heads=kv_heads * group, kv_heads=kv_heads, head_dim=data.draw(st.sampled_from((64, 128, 256)))
    )
    sms, block_size = data.draw(st.sampled_from((16, 132))), data.draw(st.sampled_from((1, 16, 64)))
    if data.draw(st.booleans()):
        queries = [1] * data.draw(st.integers(1, 300))
        graph = not fills(kind, sms, Shape(len(queries), len(queries), 0))
    else:
        queries, graph = data.draw(st.lists(st.integers(1, 700), min_size=1, max_size=20)), False
    pages = [-(-(q + data.draw(st.integers(0, 900))) // block_size) for q in queries[:20]]
    pages += [max(pages)] * (len(queries) - len(pages))
    floats, ints = taken(kind, sms, queries, pages, block_size, graph)
    room = Room.of(kind, sms, sequences=len(queries), rows=sum(queries))
    assert ints <= room.ints
    assert floats <= room.floats


@settings(deadline=None)
@given(st.sampled_from((1, 4, 8, 32)), st.sampled_from((64, 128, 256)), st.integers(1, 768), st.data())
def test_the_room_suffices_for_graphs_of_chunks(group: int, head_dim: int, rows: int, data: st.DataObject) -> None:
    """No sequence is split there, but every tile has its place that any step of the size may need."""
    sequences = data.draw(st.integers(1, rows))
    kind = replace(LLAMA, heads=8 * group, head_dim=head_dim)
    longest = (rows - sequences + 1) * group
    tile = (128 if longest > 64 and head_dim < 256 else 64) if longest > 16 else 16
    tiles = max(2 * H200_SMS // 8, -(-rows * group // tile) + sequences - 1)
    room = Room.of(kind, H200_SMS, sequences=sequences, rows=rows)
    assert 12 * tiles + 4 * (sequences + 1) + 8 + 8 * 16 <= room.ints


def test_the_room_grows_with_the_step() -> None:
    """A part of the pinned plan is copied, by the step's own room."""
    small, large = (Room.of(LLAMA, H200_SMS, sequences=n, rows=n) for n in (8, 512))
    assert small.ints < large.ints
    assert small.floats == large.floats
    assert large.floats < 72 * 2**20


@given(st.sampled_from((1, 2, 4, 8)), st.integers(1, 64))
def test_decodes_that_fill_the_device_are_not_split(kv_heads: int, sequences: int) -> None:
    kind = replace(LLAMA, heads=4 * kv_heads, kv_heads=kv_heads)
    shape = Shape(sequences, sequences, 0)
    assert fills(kind, 16, shape) == (sequences * kv_heads >= 32 // kv_heads * kv_heads)
    if fills(kind, 16, shape):
        pages = [1] * (sequences - 1) + [1000]
        floats, _ = taken(kind, 16, [1] * sequences, pages, 16, graph=False)
        assert floats == 0, "no part of a sequence is ever kept, so the plan is the same for all lengths"
