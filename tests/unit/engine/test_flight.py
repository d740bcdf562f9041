"""The end of a step: what a slot's next step continues from, whoever drew it. On the CPU."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from deployments.engine.draw import Draw
from deployments.engine.flight import Draws
from deployments.engine.sampler import Sampler
from deployments.engine.sampling import likeliest
from tests.unit.engine.drawing import BLOCK, make_draw, request

VOCAB = 50


@dataclass
class Returns:
    """A link that keeps what it was given."""

    sent: list[tuple[int, list[int]]] = field(default_factory=list)

    def send(self, slot: int, message: Tensor) -> None:
        self.sent.append((slot, message.tolist()))


def draws(returns: Returns) -> Draws:
    sampler = Sampler(torch.device("cpu"), vocab_size=VOCAB, num_blocks=8, block_size=BLOCK)
    return Draws(sampler, cast(Any, returns), slots=2)


def asked(*temperatures: float) -> Draw:
    requests = [request(temperature=temperature) for temperature in temperatures]
    return make_draw(requests, [each.row(VOCAB) for each in requests])


def test_what_a_graph_drew_ends_a_step_like_a_draw_from_logits() -> None:
    logits = torch.randn(3, VOCAB, generator=torch.manual_seed(0))
    logits[1, 7] = torch.nan
    ids, good = likeliest(logits)
    found = torch.stack((ids, torch.where(good, ids, -1)))
    ends = []
    for by_graph in (False, True):
        returns = Returns()
        made = draws(returns)
        flight = made.launch_found(1, found) if by_graph else made.launch(1, logits, asked(0.0, 0.0, 0.0))
        last = made.last_ids(1)
        assert made.last_ids(0) is None
        assert last is not None
        assert returns.sent == [(1, last.tolist())]
        ends.append((flight.result(), last.tolist()))
    assert ends[0] == ends[1]
    assert [token.bad for token in ends[0][0]] == [False, True, False]
