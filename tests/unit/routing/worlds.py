"""Small builders that the routing tests share."""

from __future__ import annotations

import random
from dataclasses import replace

from deployments.protocol import Grant, Refusal, ReplicaState, ReserveRequest
from deployments.routing.ledger import Ledger
from deployments.routing.refusals import LedgerConfig
from deployments.routing.turns import Outcome

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


def charged(book: Ledger, replica: str = "r0") -> int:
    """Blocks of a replica that grants and what outgrew them take."""
    return next(r.charged_blocks for r in book.view(0.0).replicas if r.replica_id == replica)


def finish(book: Ledger, grant: Grant, sequence: int, now: float) -> list[str]:
    """The replica says that a request has ended; returns who is granted what became free."""
    book.report(state(sequence=sequence, ended=((grant.grant_id, 1, 1),)), now)
    return [granted(outcome).request_id for outcome in book.admit(now)]


def refused(outcome: object) -> tuple[str, int | None]:
    """Kind and seconds to wait of an outcome that must be a refusal."""
    assert isinstance(outcome, Refusal), outcome
    return outcome.kind, outcome.retry_after_s


def told(outcomes: list[Outcome]) -> list[tuple[str, str]]:
    """(request, kind) of outcomes that must be refusals with a time to wait."""
    assert all(isinstance(outcome, Refusal) and outcome.retry_after_s for outcome in outcomes), outcomes
    return [(outcome.request_id, outcome.kind) for outcome in outcomes if isinstance(outcome, Refusal)]
