"""Ingresses and replicas that fall silent or die, and what becomes of their grants."""

from __future__ import annotations

from deployments.protocol import (
    IngressNotice,
    Refusal,
)
from deployments.routing.ledger import Queued
from tests.unit.routing.worlds import charged, granted, ledger, refused, state, wish


def test_a_silent_ingress_loses_its_waiters_but_not_its_grants() -> None:
    book = ledger(state())
    granted(book.reserve(wish("a", prompt=100, output=60), 0.0))
    book.reserve(wish("mine", wait_limit_s=60.0), 0.0)
    book.reserve(wish("yours", wait_limit_s=60.0, ingress_id="other"), 0.0)
    book.report(state(sequence=2), 4.0)
    book.notice(IngressNotice("other"), 4.0)
    (dropped,) = book.tick(5.0)
    assert dropped.request_id == "mine"
    assert charged(book) == 10
    assert book.view(5.0).waiting == 1


def test_a_snapshot_says_who_drains_who_is_silent_and_for_which_pool_requests_wait() -> None:
    book = ledger(state(), state("r1"))
    book.report(state("r1", 2, draining=True), 3.0)
    book.tick(3.5)
    told = [(r.alive, r.draining, r.silent_s, r.sellable) for r in book.view(3.5).replicas]
    assert told == [(False, False, 3.5, False), (True, True, 0.5, False)]
    book.reserve(wish("a"), 3.5)
    book.reserve(wish("b", pool="default"), 3.5)
    book.reserve(wish("c", pool="default"), 3.5)
    assert dict(book.view(3.5).waiting_by_pool) == {None: 1, "default": 2}


def test_a_revoked_grant_is_charged_until_its_replica_says_that_it_refuses_it() -> None:
    book = ledger(state())
    grant = granted(book.reserve(wish("q"), 0.0))
    assert book.revoked("r0") == ()
    book.notice(IngressNotice("in", left=(grant.grant_id, "unknown")), 0.1)
    assert charged(book) == 2
    assert book.revoked("r0") == ((grant.grant_id, grant.expires_at),)
    book.report(state(sequence=2), 0.2)  # made before the answer: it may still have been on its way
    assert charged(book) == 2
    assert book.revoked("r0") == ((grant.grant_id, grant.expires_at),), "the first answer may be lost"
    expected = book.view(0.3).expected_output_tokens
    book.report(state(sequence=3, ended=((grant.grant_id, 0, 0),)), 0.3)
    assert charged(book) == 0
    assert book.revoked("r0") == ()
    assert len(book._lengths._all) == 0, "it says nothing of outputs"
    assert book.view(0.3).expected_output_tokens == expected
    book.check_integrity()


def test_a_revoked_grant_that_was_taken_up_ends_with_its_replicas_report() -> None:
    book = ledger(state())
    grant = granted(book.reserve(wish("q"), 0.0))
    book.notice(IngressNotice("in", left=(grant.grant_id,)), 0.1)
    book.report(state(sequence=2, held=((grant.grant_id, 2),)), 0.2)
    assert (charged(book), book.revoked("r0")) == (2, ())
    book.report(state(sequence=3, ended=((grant.grant_id, 16, 1),)), 0.3)
    assert charged(book) == 0
    assert book.revoked("gone") == ()


def test_the_grants_of_an_ingress_that_died_are_revoked_when_its_lease_lapses() -> None:
    book = ledger(state())
    on_its_way = granted(book.reserve(wish("a", ingress_id="dead"), 0.0))
    running = granted(book.reserve(wish("b", ingress_id="dead"), 0.0))
    others = granted(book.reserve(wish("c", ingress_id="alive"), 0.0))
    waits = wish("d", prompt=100, output=28, ingress_id="dead", wait_limit_s=60.0)
    assert isinstance(book.reserve(waits, 0.0), Queued)
    book.report(state(sequence=2, held=((running.grant_id, 2),)), 1.0)
    book.renew_lease("alive", 4.0)
    assert book.tick(4.9) == []
    assert book.revoked("r0") == ()
    (dropped,) = book.tick(5.0)
    assert isinstance(dropped, Refusal)
    assert (dropped.request_id, dropped.retry_after_s) == ("d", 5)
    assert book.revoked("r0") == ((on_its_way.grant_id, on_its_way.expires_at),)
    assert charged(book) == 6, "until the replica's word"
    book.report(state(sequence=3, held=((running.grant_id, 2),), ended=((on_its_way.grant_id, 0, 0),)), 5.2)
    assert charged(book) == 4
    book.release(others.grant_id, 5.3)
    assert charged(book) == 2
    book.check_integrity()


def test_silence_hides_a_replica_until_it_reports_again() -> None:
    book = ledger(state(), state("r1"))
    book.report(state("r1", 2), 3.0)
    book.tick(3.5)
    assert [r.sellable for r in book.view(3.5).replicas] == [False, True]
    assert granted(book.reserve(wish("q"), 3.5)).replica_id == "r1"
    book.report(state(sequence=2), 3.6)
    assert book.view(3.6).ready
    book.tick(20.0)
    assert book.view(20.0).replicas == ()


def test_a_replica_called_gone_keeps_its_promises() -> None:
    book = ledger(state())
    book.reserve(wish("q"), 0.0)
    book.notice(IngressNotice("in", lost=(("r0", 0), ("r0", 1), ("unknown", 1))), 0.1)
    assert not book.view(0.1).ready
    refusal = book.reserve(wish("p"), 0.1)
    assert isinstance(refusal, Refusal)
    assert refusal.kind == "no_replica"
    book.report(state(sequence=2), 0.2)
    assert charged(book) == 2


def test_while_all_are_silent_requests_wait_until_one_returns() -> None:
    book = ledger(state())
    book.tick(3.5)
    assert not book.view(3.5).ready
    assert isinstance(book.reserve(wish("q"), 3.5), Queued)
    assert refused(book.reserve(wish("long", prompt=160), 3.5))[0] == "too_long"
    assert book.tick(4.0) == []
    book.report(state(sequence=2), 4.5)
    assert [granted(outcome).request_id for outcome in book.admit(4.5)] == ["q"]


def test_they_wait_no_longer_than_their_deadline_or_until_all_are_forgotten() -> None:
    book = ledger(state())
    book.tick(3.5)
    book.reserve(wish("short", wait_limit_s=5.0), 3.5)
    book.reserve(wish("long", wait_limit_s=60.0), 3.5)
    ends = []
    for second in range(4, 21):
        book.renew_lease("in", float(second))
        ends += [(second, outcome.request_id, refused(outcome)[0]) for outcome in book.tick(float(second))]
    assert ends == [(9, "short", "deadline"), (17, "long", "no_replica")]
    assert refused(book.reserve(wish("late"), 20.0))[0] == "no_replica"


def test_nobody_waits_for_a_silent_replica_that_a_call_found_dead_or_that_was_draining() -> None:
    book = ledger(state(), state("r1"))
    book.report(state("r1", 2, draining=True), 0.1)
    book.tick(3.5)
    assert isinstance(book.reserve(wish("q"), 3.5), Queued)
    assert book.admit(3.5) == []
    book.replica_gone("r0", 1)
    assert [refused(outcome)[0] for outcome in book.admit(3.6)] == ["no_replica"]
    assert refused(book.reserve(wish("p"), 3.6))[0] == "no_replica"
    book.report(state("r0", 2), 3.7)
    book.tick(7.5)
    assert isinstance(book.reserve(wish("o"), 7.5), Queued), "it was alive after that call"


def test_what_fits_a_replica_that_just_fell_silent_waits_instead_of_being_too_long() -> None:
    book = ledger(state(), state("large", capacity_blocks=20, max_context=320))
    book.replica_gone("large", 1)
    assert isinstance(book.reserve(wish("q", prompt=200, output=1), 0.0), Queued)
    book.report(state("large", 2, capacity_blocks=20, max_context=320), 0.5)
    assert granted(book.admit(0.5)[0]).replica_id == "large"


def test_news_names_replicas_that_fell_silent_and_not_those_that_were_lost() -> None:
    book = ledger(state("a"), state("b"), state("c"))
    book.replica_gone("c", 1)
    book.report(state("b", 2), 4.0)
    book.report(state("c", 2), 4.0)
    book.replica_gone("c", 1)
    book.tick(4.0)
    assert book.news().silent == (("a", 1),)
    assert [spot.replica_id for spot in book.news().spots] == ["b"]
