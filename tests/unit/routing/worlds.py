"""Small builders that the routing tests share."""

from __future__ import annotations

import random
from dataclasses import replace

from deployments.protocol import Grant, ReplicaState, ReserveRequest
from deployments.routing.ledger import Ledger
from deployments.routing.refusals import LedgerConfig

EPOCH = 7


def state(replica: str = "r0", sequence: int = 1, **changes: object) -> ReplicaState:
    """A report of a replica of 10 blocks of 16 tokens that knows ledger 7."""
    base = ReplicaState(replica, "default", 1, sequence, 16, 10, 160, ledger_epoch=EPOCH)
    return replace(base, **changes)  # type: ignore[arg-type]  # fields by name


def wish(key: str, prompt: int = 16, output: int = 16, **changes: object) -> ReserveRequest:
    """A request of 2 blocks that waits up to 5 s."""
    return replace(ReserveRequest(key, "in", prompt, output, 5.0), **changes)  # type: ignore[arg-type]  # fields by name


def ledger(*states: ReplicaState, now: float = 0.0, epoch: int = EPOCH, **changes: object) -> Ledger:
    """A ledger that has heard these reports, and needs no more of them to be warm."""
    config = replace(LedgerConfig("m", expected_replicas=len(states)), **changes)  # type: ignore[arg-type]  # fields by name
    built = Ledger(config, epoch=epoch, now=now, rng=random.Random(0))
    for report in states:
        built.report(report, now)
    return built


def granted(outcome: object) -> Grant:
    """The outcome, which must be a grant."""
    assert isinstance(outcome, Grant), outcome
    return outcome
