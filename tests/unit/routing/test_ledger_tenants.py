"""Tenants' shares of the ledger's queue, and who makes room."""

from __future__ import annotations

from dataclasses import replace

import pytest

from deployments.protocol import (
    Prefix,
    ReplicaState,
    ReserveRequest,
)
from deployments.routing.ledger import Ledger, Queued
from tests.unit.routing.worlds import finish, granted, ledger, refused, state, told, wish


def test_a_flood_of_one_tenant_does_not_hold_up_another() -> None:
    book = ledger(state())
    running = [granted(book.reserve(wish(f"f{k}", tenant="flood"), 0.0)) for k in range(5)]
    for k in range(5, 500):
        book.reserve(wish(f"f{k}", tenant="flood"), 0.0)
    book.reserve(wish("mine", tenant="me"), 0.0)
    served = finish(book, running[0], 2, 0.1) + finish(book, running[1], 3, 0.1)
    assert served == ["f5", "mine"]


def test_weights_come_from_the_config() -> None:
    book = ledger(state(), tenant_weights=(("me", 3),))
    running = [granted(book.reserve(wish(f"f{k}", tenant="flood"), 0.0)) for k in range(5)]
    for k in range(8):
        book.reserve(wish(f"f{k}", tenant="flood"), 0.0) if k >= 5 else None
        book.reserve(wish(f"m{k}", tenant="me"), 0.0)
    served = [key for k, grant in enumerate(running[:4]) for key in finish(book, grant, k + 2, 0.1)]
    assert sorted(key[0] for key in served) == ["f", "m", "m", "m"]


def flooded(flood: int = 8, queue_limit: int = 8, **changes: object) -> Ledger:
    """The only replica is full, and so is the queue of 8, with requests of one tenant."""
    book = ledger(state(), queue_limit=queue_limit, **changes)  # type: ignore[arg-type]  # fields by name
    granted(book.reserve(wish("running", prompt=100, output=60), 0.0))
    for k in range(flood):
        assert isinstance(book.reserve(wish(f"f{k}", tenant="flood"), 0.0), Queued)
    return book


def test_a_flood_makes_room_for_another_tenant_up_to_its_share_of_the_queue() -> None:
    book = flooded()
    answers = [book.reserve(wish(f"m{k}", tenant="me"), 0.0) for k in range(6)]
    assert [isinstance(answer, Queued) for answer in answers] == [True] * 4 + [False] * 2
    assert refused(answers[4])[0] == "queue_full"
    assert told(book.admit(0.0)) == [(f"f{k}", "queue_full") for k in (7, 6, 5, 4)], "the latest first"
    assert book.admit(0.0) == [], "each is told once"
    assert refused(book.reserve(wish("f8", tenant="flood"), 0.0))[0] == "queue_full"
    assert book.view(0.0).waiting == 8
    book.check_integrity()


def test_shares_of_the_queue_go_by_weight() -> None:
    book = flooded(tenant_weights=(("flood", 3),))
    answers = [book.reserve(wish(f"m{k}", tenant="me"), 0.0) for k in range(4)]
    assert [isinstance(answer, Queued) for answer in answers] == [True, True, False, False]
    heavy = [book.reserve(wish(f"h{k}", tenant="heavy", weight=4), 0.0) for k in range(5)]
    assert [isinstance(answer, Queued) for answer in heavy] == [True] * 4 + [False]
    assert told(book.displaced()) == [(key, "queue_full") for key in ("f7", "f6", "f5", "f4", "f3", "m1")]


def test_the_least_urgent_of_the_tenant_most_over_its_share_makes_room() -> None:
    book = flooded(4)
    book.reserve(wish("low", tenant="other", priority=9), 0.0)
    book.reserve(wish("lowest", tenant="flood", priority=9), 0.0)
    for k in range(2):
        book.reserve(wish(f"f1{k}", tenant="flood"), 0.0)
    assert isinstance(book.reserve(wish("mine", tenant="me", priority=99), 0.0), Queued)
    assert told(book.tick(0.1)) == [("lowest", "queue_full")]


def test_who_lost_its_replica_waits_however_many_do_and_is_first() -> None:
    book = ledger(state(), queue_limit=2)
    lost = granted(book.reserve(wish("lost", prompt=100, output=60), 0.0))
    for k in range(2):
        book.reserve(wish(f"q{k}", tenant=f"t{k}", priority=-9), 0.0)
    assert isinstance(book.reserve(wish("lost~1", prompt=100, output=60, priority=9, resumes=True), 0.1), Queued)
    assert isinstance(book.reserve(wish("other~1", tenant="t0", priority=10, resumes=True), 0.1), Queued)
    assert refused(book.reserve(wish("new"), 0.1))[0] == "queue_full"
    book.release(lost.grant_id, 0.2)
    (again,) = book.admit(0.2)
    assert granted(again).request_id == "lost~1"
    book.release(granted(again).grant_id, 0.3)
    assert [granted(outcome).request_id for outcome in book.admit(0.3)] == ["other~1", "q0", "q1"]
    book.check_integrity()


def test_who_has_lost_a_replica_makes_no_room() -> None:
    book = flooded(6)
    for k in range(2):
        book.reserve(wish(f"resumed{k}", tenant="flood", priority=9, resumes=True), 0.0)
    assert isinstance(book.reserve(wish("mine", tenant="me"), 0.0), Queued)
    assert told(book.tick(0.1)) == [("f5", "queue_full")]


def test_where_all_have_lost_a_replica_the_newcomer_is_refused() -> None:
    book = flooded(0)
    for k in range(8):
        book.reserve(wish(f"resumed{k}", tenant="flood", resumes=True), 0.0)
    assert refused(book.reserve(wish("mine", tenant="me"), 0.0))[0] == "queue_full"
    assert book.displaced() == []


def test_many_tenants_with_one_request_each_make_no_room() -> None:
    book = flooded(0)
    for k in range(8):
        assert isinstance(book.reserve(wish(f"q{k}", tenant=f"t{k}"), 0.0), Queued)
    assert refused(book.reserve(wish("late", tenant="late"), 0.0))[0] == "queue_full"
    assert book.displaced() == []


def test_a_displaced_request_that_leaves_first_is_told_nothing_and_its_id_is_free_then() -> None:
    book = flooded()
    book.reserve(wish("mine", tenant="me"), 0.0)
    with pytest.raises(ValueError, match="f7 waits already"):
        book.reserve(wish("f7", tenant="flood"), 0.0)
    book.cancel("f7", 0.0)
    assert book.tick(0.0) == []
    assert refused(book.reserve(wish("f7", tenant="flood"), 0.0))[0] == "queue_full"


def test_a_displaced_request_is_told_while_the_ledger_is_new() -> None:
    book = ledger(expected_replicas=1, queue_limit=2)
    for k in range(2):
        book.reserve(wish(f"f{k}", tenant="flood"), 0.0)
    assert isinstance(book.reserve(wish("mine", tenant="me"), 0.0), Queued)
    assert told(book.tick(0.1)) == [("f1", "queue_full")]


def test_a_newcomer_passes_one_with_a_prefix_that_waits_in_vain_at_once() -> None:
    book = ledger(state())
    granted(book.reserve(wish("running", prompt=100, output=12), 0.0))  # 3 of 10 blocks are left
    assert isinstance(book.reserve(wish("large", prompt=60, prefix=Prefix(16, (1, 2))), 0.0), Queued)
    granted(book.reserve(wish("small"), 0.0))
    book.check_integrity()


def with_one_that_none_can_hold(*more: ReserveRequest) -> tuple[Ledger, ReplicaState]:
    """The last report at 24 s of a full replica of 160 tokens, after the other, of 320, was forgotten.

    Of those that wait "second" of tenant b, the second of its line, would have needed that one.
    """
    small = state("small")
    book = ledger(small)
    grants = [granted(book.reserve(wish(f"running{n}", prompt=n - 1, output=1), 0.0)) for n in (144, 16)]
    small = replace(small, held=tuple((grant.grant_id, grant.blocks) for grant in grants))
    book.report(state("big", capacity_blocks=20, max_context=320), 0.0)
    granted(book.reserve(wish("large", prompt=319, output=1), 0.0))
    for key, tokens, tenant in (("first", 150, "a"), ("second", 210, "b")):
        book.reserve(wish(key, prompt=tokens - 1, output=1, tenant=tenant, wait_limit_s=1e6), 0.0)
    for request in more:
        book.reserve(request, 0.0)
    for now in range(1, 25):
        small = replace(small, sequence=1 + now)
        book.report(small, float(now))
        book.renew_lease("in", float(now))
        assert book.tick(float(now)) == []
        book.check_integrity()
    return book, small


def test_whom_no_replica_can_hold_is_refused_once_the_one_before_it_has_left() -> None:
    book, _ = with_one_that_none_can_hold()
    book.cancel("first", 25.0)
    (outcome,) = book.tick(25.0)
    assert (refused(outcome)[0], outcome.request_id) == ("no_replica", "second")
    book.check_integrity()


def test_whom_no_replica_can_hold_is_refused_once_its_tenants_turn_has_come() -> None:
    """A grant in another line moved the tenant on that stood before it."""
    tiny = wish("tiny", prompt=15, output=1, tenant="a", wait_limit_s=1e6)
    book, small = with_one_that_none_can_hold(tiny)
    ended = small.held[1][0], 15, 1
    book.report(replace(small, sequence=small.sequence + 1, held=small.held[:1], ended=(ended,)), 25.0)
    served, outcome = book.tick(25.0)
    assert granted(served).request_id == "tiny"
    assert (refused(outcome)[0], outcome.request_id) == ("no_replica", "second")
    book.check_integrity()


def test_a_tenant_with_nobody_to_make_room_does_not_shield_another_that_is_over_its_share() -> None:
    book = flooded(6, queue_limit=6)
    for k in range(8):
        assert isinstance(book.reserve(wish(f"resumed{k}", tenant="a", resumes=True), 0.0), Queued)
    assert isinstance(book.reserve(wish("mine", tenant="me"), 0.0), Queued)
    assert told(book.tick(0.1)) == [("f5", "queue_full")]
    book.check_integrity()
