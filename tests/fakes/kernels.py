"""FlashInfer's kernels as its documentation describes them, in plain PyTorch on the CPU."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

import torch
from torch import Tensor

from deployments.engine.attention_tables import Shape, Tables
from deployments.engine.flashinfer_fit import Kind, Room
from deployments.engine.flashinfer_kernels import Call, Planned, Progress, Workspace


class FakeKernels:
    """Reads nothing but the uploaded tables and the plan in the workspace, so a lost or late upload shows."""

    def __init__(self, model: Hashable = "fake GPU") -> None:
        self.model = model
        self.compiled: list[Kind] = []
        self.plans: list[tuple[Kind, str]] = []
        self.shapes: list[Shape] = []
        """What was planned for, like `plans`."""
        self.moody = False
        """Plans equal steps differently."""
        self.own = 0
        """Decodes of up to so many sequences are one kernel."""
        self.own_rows: list[int] = []
        """Of the calls of that kernel: sequences with a row."""

    def room(self, kind: Kind, *, sequences: int, rows: int) -> Room:
        assert kind in self.compiled
        return Room(floats=kind.heads * rows * 4, ints=4 * (1 + sequences))

    def compile(self, kinds: Iterable[Kind], progress: Progress) -> None:
        for kind in kinds:
            self.compiled.append(kind)
            progress(f"compiled {kind.head_dim}")

    def plan(self, kind: Kind, host: Tables, block_size: int, space: Workspace, pinned: Tensor) -> Planned:
        """The plan is the lengths of the sequences, behind the tokens per block."""
        assert pinned.shape == space.ints.shape
        plan = torch.cat([torch.tensor([block_size], dtype=torch.int32), host.lengths])
        pinned[: plan.nbytes] = plan.view(torch.uint8)
        assert host.query_starts[0] == host.shape.before
        space.ints[: plan.nbytes].copy_(pinned[: plan.nbytes])
        method = kind.method(decodes=host.shape.decodes)
        self.plans.append((kind, method))
        self.shapes.append(host.shape)
        return Planned(method, 0 if host.shape.decodes else 1, [host.shape.rows, len(self.plans) * self.moody])

    def takes_decodes(self, kind: Kind, shape: Shape, splits: int) -> bool:
        assert kind in self.compiled
        assert shape.sequences == shape.rows
        assert splits > 0
        return shape.sequences <= self.own

    def attend_decodes(
        self, call: Call, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, out: Tensor
    ) -> None:
        """Reads no plan, as the real kernel does not."""
        tables, block_size = call.tables, keys.shape[1]
        lengths, starts, each = (t.tolist() for t in (tables.lengths, tables.split_starts, tables.split_tokens))
        assert starts[-1] <= len(lengths) + call.splits
        self.own_rows.append(sum(length > 0 for length in lengths))
        for row, length in enumerate(lengths):
            assert starts[row + 1] - starts[row] == -(-length // each[0])
            if not length:
                continue
            pages = tables.pages[tables.page_starts[row] : tables.page_starts[row + 1]]
            for blocks, rows in ((keys, key), (values, value)):
                blocks[pages[(length - 1) // block_size], (length - 1) % block_size] = rows[row]
            kv = (_gather(blocks, pages, length, call.kind.group) for blocks in (keys, values))
            out[row : row + 1] = _attend(call, query[row : row + 1], *kv)

    def append(self, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, tables: Tables) -> None:
        block_size = keys.shape[1]
        places = tables.page_starts[tables.row_sequences] + tables.positions // block_size
        slots = tables.pages[places] * block_size + tables.positions % block_size
        for blocks, rows in ((keys, key), (values, value)):
            assert blocks.dtype == rows.dtype
            flat = blocks.view(torch.uint8) if blocks.itemsize == 1 else blocks
            flat.flatten(0, 1)[slots] = rows.contiguous().view(flat.dtype)

    def run(self, call: Call, query: Tensor, keys: Tensor, values: Tensor, out: Tensor) -> None:
        kind, tables = call.kind, call.tables
        block_size, *lengths = call.space.ints.view(torch.int32)[: tables.shape.sequences + 1].tolist()
        assert query.shape[1:] == (kind.heads, kind.head_dim)
        assert block_size == keys.shape[1]
        for i, length in enumerate(lengths):
            own = slice(tables.query_starts[i], tables.query_starts[i + 1])
            rows = query[own]
            pages = tables.pages[tables.page_starts[i] : tables.page_starts[i + 1]]
            last = tables.last_page_tokens[i].item()
            assert length == (len(pages) - 1) * block_size + last
            assert len(rows) == 1 or call.planned.mask == 1
            out[own] = _attend(call, rows, *(_gather(blocks, pages, length, kind.group) for blocks in (keys, values)))


def _gather(blocks: Tensor, pages: Tensor, length: int, group: int) -> Tensor:
    """float64 [heads, length, head_dim]."""
    tokens = blocks[pages.long()].flatten(0, 1)[:length].double()
    return tokens.transpose(0, 1).repeat_interleave(group, dim=0)


def _attend(call: Call, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """[rows, heads, head_dim], the rows at the end of the sequence."""
    rows, length = len(query), keys.shape[1]
    scores = (query.double().transpose(0, 1) @ keys.transpose(1, 2)) * call.scale
    if call.kind.softcap is not None:
        scores = call.kind.softcap * torch.tanh(scores / call.kind.softcap)
    row = torch.arange(length - rows, length)[:, None]
    key = torch.arange(length)[None]
    visible = key <= row
    if call.kind.window_left >= 0:
        visible &= key >= row - call.kind.window_left
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return (weights @ values).transpose(0, 1).to(query.dtype)
