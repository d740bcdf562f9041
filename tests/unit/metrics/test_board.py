"""What the board keeps of plans and rates. The rest is tested by the pages that show it."""

from __future__ import annotations

from dataclasses import replace

from deployments.metrics.board import FORGET_S, Board
from deployments.metrics.pacing import OUTLINE_EVERY_S
from deployments.protocol import ReplicaState
from placement.outline import outline
from tests.unit.fleet.scenes import plan_on
from tests.unit.metrics.samples import VIEW, replica_vitals

OUTLINE = outline(plan_on(24))


def report(replica: str = "r1", **vitals: object) -> ReplicaState:
    return ReplicaState(replica, "default", 1, 1, 16, 100, 1600, vitals=replica_vitals(**vitals))


def test_a_plan_stays_between_two_tellings() -> None:
    assert OUTLINE_EVERY_S < FORGET_S
    board = Board()
    board.hear_replica(report(outline=OUTLINE), 0.0)
    board.hear_replica(report(), 1.0)
    assert board.observe(VIEW, 2, OUTLINE_EVERY_S + 1.0).outlines == {"r1": OUTLINE}
    assert board.observe(VIEW, 2, FORGET_S + 0.1).outlines == {}


def test_a_new_plan_takes_the_old_ones_place() -> None:
    board, other = Board(), outline(plan_on(80, 80))
    board.hear_replica(report(outline=OUTLINE), 0.0)
    board.hear_replica(report(outline=other), 1.0)
    assert board.observe(VIEW, 2, 1.0).outlines == {"r1": other}


def test_output_rates_are_of_the_last_seconds() -> None:
    board = Board()
    for second in range(20):
        board.hear_replica(report(output_tokens=50 * second), float(second))
        board.hear_replica(replace(report(), vitals=None), second + 0.5)  # most reports bring none
    board.hear_replica(report("r2"), 19.0)
    assert board.observe(VIEW, 2, 19.0).output_rates == {"r1": 50.0}


def test_replicas_that_the_ledger_forgot_are_not_shown() -> None:
    board = Board()
    for now in (0.0, 1.0):
        board.hear_replica(report("gone", outline=OUTLINE), now)
    seen = board.observe(VIEW, 2, 1.0)
    assert (seen.outlines, seen.output_rates) == ({}, {})
