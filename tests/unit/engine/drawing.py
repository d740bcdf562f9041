"""Requests given as lists of ids, laid out in blocks and drawn by a `Sampler`: shared by its tests on every device."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from deployments.engine.draw import Draw
from deployments.engine.sampler import Drawn, Sampler
from deployments.engine.sampling import SampledToken
from deployments.engine.sampling_batch import Row
from deployments.protocol import Sampling

BLOCK = 4
"""Tokens per block: small, so that histories take several."""


@dataclass(frozen=True)
class Request:
    """One row: its parameters, and the tokens before the one that is drawn."""

    sampling: Sampling
    prompt: list[int] = field(default_factory=list)
    output: list[int] = field(default_factory=list)
    position: int | None = None
    """Overrides the number of tokens, where no penalty reads them."""

    @property
    def ids(self) -> list[int]:
        return self.prompt + self.output

    def row(self, vocab_size: int) -> Row:
        return Row(self.sampling, len(self.prompt), vocab_size)


def request(prompt: list[int] | None = None, output: list[int] | None = None, **params: Any) -> Request:
    """With a seed and `max_tokens` where the test doesn't care."""
    position = params.pop("position", None)
    return Request(Sampling(**{"max_tokens": 100, "seed": 7, **params}), prompt or [], output or [], position)


def make_draw(requests: list[Request], rows: list[Row]) -> Draw:
    """Block tables one after the other, each block used once."""
    tables: list[tuple[int, ...]] = []
    taken = 0
    for each in requests:
        blocks = -(-len(each.ids) // BLOCK)
        tables.append(tuple(range(taken, taken + blocks)))
        taken += blocks
    positions = tuple(len(each.ids) if each.position is None else each.position for each in requests)
    return Draw(tuple(rows), positions, tuple(tables))


def note(sampler: Sampler, requests: list[Request], draw: Draw) -> None:
    """What the steps before wrote into the history."""
    device = sampler.history.ids.device
    for each, table in zip(requests, draw.tables, strict=True):
        slots = [table[p // BLOCK] * BLOCK + p % BLOCK for p in range(len(each.ids))]
        ids = torch.tensor(each.ids, dtype=torch.int64, device=device)
        sampler.note_inputs(ids, torch.tensor(slots, dtype=torch.int64, device=device))


def draw_requests(logits: Tensor, requests: list[Request]) -> Drawn:
    """One step of a new sampler on the logits' device."""
    vocab_size = logits.shape[1]
    blocks = sum(-(-len(each.ids) // BLOCK) for each in requests)
    sampler = Sampler(logits.device, vocab_size=vocab_size, num_blocks=blocks, block_size=BLOCK)
    draw = make_draw(requests, [each.row(vocab_size) for each in requests])
    note(sampler, requests, draw)
    return sampler.draw(logits, draw)


def tokens(logits: Tensor, requests: list[Request]) -> list[SampledToken]:
    """The same, read."""
    return draw_requests(logits, requests).read()
