"""What FlashInfer's plans are made of and mended with, on a scheduler that writes what FlashInfer's writes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from deployments.engine import flashinfer_kernels
from deployments.engine.attention import RowSpan
from deployments.engine.attention_tables import Shape, Tables, pack
from deployments.engine.flashinfer_fit import Kind, Room, tile_of
from deployments.engine.flashinfer_kernels import FlashInferKernels, Workspace

SMS, BLOCK = 16, 16
KIND = Kind(32, 8, 128, torch.bfloat16, torch.bfloat16, None, None)


class PrefillModule:
    """`plan` of a graph without splits, after FlashInfer's `PrefillPlan`: where it writes what, and its copy."""

    def plan(
        self,
        floats: Tensor,
        ints: Tensor,
        pinned: Tensor,
        query_starts: Tensor,
        page_starts: Tensor,
        lengths: Tensor,
        rows: int,
        sequences: int,
        heads: int,
        kv_heads: int,
        block_size: int,
        graph: bool,
        *rest: Any,
    ) -> list[int]:
        del floats, page_starts, lengths, block_size, rest
        assert graph
        group = heads // kv_heads
        tile = tile_of((rows - sequences + 1) * group, 128)
        counts = query_starts.diff().tolist()
        tiles = [(i, t) for i, count in enumerate(counts) for t in range(-(-count * group // tile))]
        room = max(2 * SMS // kv_heads, -(-rows * group // tile) + sequences - 1)
        assert len(tiles) <= room
        offsets = [16 * (-(-4 * room // 16)) * k for k in range(3)]
        first_rows = offsets[-1] + 16 * -(-4 * room // 16)
        writes = [[i for i, _ in tiles], [t for _, t in tiles], [0] * len(tiles)]
        for offset, values in zip(offsets, writes, strict=True):
            _integers(pinned, offset, len(values))[:] = torch.tensor(values, dtype=torch.int32)
        starts = [0, *np.cumsum(counts).tolist()]
        _integers(pinned, first_rows, sequences + 1)[:] = torch.tensor(starts, dtype=torch.int32)
        ints.copy_(pinned)
        return [room, rows, 0, tile, *offsets, 0, first_rows, 0, 0, 0, 0, 1, 0]


def _integers(buffer: Tensor, offset: int, count: int) -> Tensor:
    return buffer[offset : offset + 4 * count].view(torch.int32)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> FlashInferKernels:
    monkeypatch.setattr(flashinfer_kernels, "_prefill_module", lambda _: PrefillModule())
    made = object.__new__(FlashInferKernels)  # what __init__ does needs a GPU
    made._sms = SMS
    return made


@pytest.mark.parametrize("decodes", [0, 1, 3])
def test_a_graphs_chunks_begin_behind_its_decodes(kernels: FlashInferKernels, decodes: int) -> None:
    """Of both parts' plans, each sequence's tiles, and the row of the output that its first one writes."""
    empty = RowSpan(0, 0, ())
    spans = [
        *[RowSpan(20, 1, (0, 1))] * decodes,
        *[empty] * (4 - decodes),
        RowSpan(0, 40, (2, 3, 4)),
        RowSpan(3, 2, (5,)),
    ]
    spans += [empty] * 2
    buffer = torch.zeros(4096, dtype=torch.int32)
    shape = pack(spans, BLOCK, buffer.numpy())
    whole = Tables.view(buffer, Shape(8, shape.rows, shape.pages, captured=True, ahead=4, before=decodes))
    before, after = whole.parts()
    written: dict[int, int] = {}
    for first, part in ((0, before), (4, after)):
        room = Room.of(KIND, SMS, sequences=128, rows=128).ints
        pinned, ints = (torch.full((room,), 99, dtype=torch.uint8) for _ in range(2))
        planned = kernels.plan(KIND, part, BLOCK, Workspace(torch.zeros(0), ints), pinned)
        assert planned.method == "prefill"
        info = planned.info
        requests, tiles = (_integers(ints, info[k], info[0]).tolist() for k in (4, 5))
        starts = _integers(ints, info[8], part.shape.sequences + 1).tolist()
        for request, tile in zip(requests, tiles, strict=True):
            if part.query_starts[request + 1] == part.query_starts[request]:  # a block of threads without work
                assert (request, tile) == (part.shape.sequences - 1, 0)
            elif tile == 0:
                assert starts[request] == part.query_starts[request], "its output is where its queries are"
                written[first + request] = starts[request]
        assert torch.equal(ints, pinned)
    assert written == {**{i: i for i in range(decodes)}, 4: decodes, 5: decodes + 40}


def test_a_decode_beside_a_chunk_takes_a_decodes_tile(kernels: FlashInferKernels) -> None:
    spans = [RowSpan(20, 1, (0, 1)), RowSpan(0, 0, ()), RowSpan(0, 100, tuple(range(7))), RowSpan(0, 0, ())]
    buffer = torch.zeros(4096, dtype=torch.int32)
    shape = pack(spans, BLOCK, buffer.numpy())
    whole = Tables.view(buffer, Shape(4, shape.rows, shape.pages, captured=True, ahead=2, before=1))
    found = []
    for part in whole.parts():
        room = Room.of(KIND, SMS, sequences=128, rows=128).ints
        space = Workspace(torch.zeros(0), torch.zeros(room, dtype=torch.uint8))
        found.append(kernels.plan(KIND, part, BLOCK, space, torch.zeros(room, dtype=torch.uint8)).info[3])
    assert found == [16, 128]
