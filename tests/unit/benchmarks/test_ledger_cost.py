"""The part of the benchmark that plays ingress and replicas through Ray, against a ledger without Ray."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import ledger_cost
from benchmarks.ledger_cost import EPOCH, Asker
from deployments.protocol import Grant, Refusal, ReplicaState, ReserveRequest
from deployments.routing.ledger import Ledger, Queued
from deployments.routing.refusals import LedgerConfig


class Direct:
    """The ledger's deployment, as far as the benchmark calls it."""

    def __init__(self) -> None:
        self.book = Ledger(LedgerConfig("m"), epoch=EPOCH, now=0.0, rng=random.Random(0))
        self.wishes: dict[str, ReserveRequest] = {}
        self.ended: dict[str, tuple[int, int]] = {}
        self.report = SimpleNamespace(remote=self._report)
        self.reserve = SimpleNamespace(remote=self._reserve)

    async def _report(self, state: ReplicaState) -> Any:
        self.ended.update({key: (prompt, output) for key, prompt, output in state.ended})
        return SimpleNamespace(epoch=self.book.report(state, 0.0))

    async def _reserve(self, wish: ReserveRequest) -> Grant | Queued | Refusal:
        answer = self.book.reserve(wish, 0.0)
        assert isinstance(answer, Grant)
        self.wishes[answer.grant_id] = wish
        return answer


async def test_the_ledger_learns_of_prompts_and_outputs_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_cost, "REPORT_S", 0.001)
    ledger = Direct()
    assert await Asker(ledger).measure(replicas=8, rate=20, seconds=1) == [], "the first second doesn't count"
    assert ledger.ended
    for key, (prompt, output) in ledger.ended.items():
        wish = ledger.wishes[key]
        assert prompt == wish.prompt_tokens
        assert 1 <= output <= wish.max_tokens
    assert len({output for _, output in ledger.ended.values()}) > 1


async def test_what_a_report_raises_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_cost, "REPORT_S", 0.001)
    ledger = Direct()
    heard = ledger.report.remote

    async def report(state: ReplicaState) -> Any:
        if state.sequence > 4:
            raise RuntimeError("the ledger is gone")
        return await heard(state)

    ledger.report.remote = report
    with pytest.raises(ExceptionGroup) as raised:
        await Asker(ledger).measure(replicas=2, rate=20, seconds=60)
    assert raised.group_contains(RuntimeError, match="the ledger is gone")
