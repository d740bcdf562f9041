from __future__ import annotations

import time
from dataclasses import replace

import pytest

from deployments.protocol import (
    PROTOCOL_VERSION,
    CachedGranules,
    IngressNotice,
    Prefix,
    Refusal,
)
from deployments.routing.ledger import Queued
from tests.unit.routing.worlds import EPOCH, charged, granted, ledger, state, wish


def test_a_grant_names_replica_blocks_and_expiry() -> None:
    book = ledger(state())
    grant = granted(book.reserve(wish("q", prompt=20, output=20, pool="default"), 1.0))
    assert (grant.replica_id, grant.replica_epoch, grant.ledger_epoch) == ("r0", 1, EPOCH)
    assert grant.blocks == 3  # 40 tokens in blocks of 16
    assert grant.expires_at == 11.0
    assert charged(book) == 3
    book.check_integrity()


def test_an_unused_grant_is_given_back_once() -> None:
    book = ledger(state())
    grant = granted(book.reserve(wish("q"), 0.0))
    book.release(grant.grant_id, 0.0)
    book.release(grant.grant_id, 0.0)
    book.release("unknown", 0.0)
    assert charged(book) == 0
    book.check_integrity()


def test_a_held_grant_ends_with_the_replicas_word_alone() -> None:
    book = ledger(state())
    grant = granted(book.reserve(wish("q"), 0.0))
    book.report(state(sequence=2, held=((grant.grant_id, 2),)), 0.1)
    book.release(grant.grant_id, 0.2)
    assert charged(book) == 2
    book.report(state(sequence=3, ended=((grant.grant_id, 16, 9),)), 0.3)
    assert charged(book) == 0
    book.check_integrity()


def test_a_held_grant_also_ends_when_it_is_no_longer_listed() -> None:
    book = ledger(state())
    grant = granted(book.reserve(wish("q"), 0.0))
    book.report(state(sequence=2), 0.1)  # made before the request arrived there
    assert charged(book) == 2
    book.report(state(sequence=3, held=((grant.grant_id, 2),)), 0.2)
    book.report(state(sequence=4), 0.3)
    assert charged(book) == 0


def test_growth_and_unknown_grants_are_charged() -> None:
    book = ledger(state())
    grant = granted(book.reserve(wish("q"), 0.0))
    book.report(state(sequence=2, held=((grant.grant_id, 5), ("of another ledger", 3))), 0.1)
    assert charged(book) == 8
    assert isinstance(book.reserve(wish("large", prompt=40, output=8), 0.2), Queued)


MANY = {"capacity_blocks": 1000, "max_context": 16_000, "max_requests": 4}
"""A replica with room for 500 requests that takes 4 at once."""


def test_a_replica_is_granted_no_more_requests_than_it_takes() -> None:
    book = ledger(state(**MANY))
    grants = [granted(book.reserve(wish(f"q{k}"), 0.0)) for k in range(4)]
    assert isinstance(book.reserve(wish("fifth"), 0.0), Queued)
    assert book.admit(0.1) == []
    assert [(spot.headroom_blocks, spot.requests_left) for spot in book.news().spots] == [(0, 0)]
    book.check_integrity()
    held = tuple((grant.grant_id, 2) for grant in grants)
    book.report(state(sequence=2, held=held, **MANY), 0.2)
    assert book.admit(0.2) == []
    book.report(state(sequence=3, held=held[1:], ended=((grants[0].grant_id, 16, 9),), **MANY), 0.3)
    (fifth,) = book.admit(0.3)
    assert granted(fifth).request_id == "fifth"
    assert isinstance(book.reserve(wish("sixth"), 0.3), Queued)
    book.check_integrity()


def test_a_grant_that_is_given_back_makes_room_for_another_request() -> None:
    book = ledger(state(**MANY))
    grants = [granted(book.reserve(wish(f"q{k}"), 0.0)) for k in range(4)]
    assert isinstance(book.reserve(wish("fifth"), 0.0), Queued)
    book.notice(IngressNotice("in", unused=(grants[0].grant_id,)), 0.1)
    (fifth,) = book.admit(0.1)
    assert granted(fifth).request_id == "fifth"
    book.check_integrity()


def test_what_exceeds_a_replicas_requests_goes_to_another() -> None:
    book = ledger(state(**MANY), state("r1"))
    placed = [granted(book.reserve(wish(f"q{k}"), 0.0)).replica_id for k in range(9)]
    assert sorted(placed) == ["r0"] * 4 + ["r1"] * 5
    assert isinstance(book.reserve(wish("tenth"), 0.0), Queued)
    book.check_integrity()


def test_requests_of_an_earlier_ledger_count() -> None:
    book = ledger(state(held=(("a", 1), ("b", 1), ("c", 1)), **MANY))
    first = granted(book.reserve(wish("q0"), 0.0))
    assert isinstance(book.reserve(wish("q1"), 0.0), Queued)
    book.report(state(sequence=2, held=((first.grant_id, 2),), **MANY), 0.1)
    assert [granted(outcome).request_id for outcome in book.admit(0.1)] == ["q1"]
    book.check_integrity()


def test_a_prefix_does_not_draw_requests_to_a_replica_that_takes_no_more() -> None:
    used = CachedGranules(whole=True, used=(1, 2))
    book = ledger(state(granules=used, held=tuple((f"h{k}", 2) for k in range(4)), **MANY), state("r1"))
    grant = granted(book.reserve(wish("q", prompt=40, prefix=Prefix(16, (1, 2))), 0.0))
    assert (grant.replica_id, grant.shared_blocks) == ("r1", 0)


def test_late_and_duplicate_reports_change_nothing() -> None:
    book = ledger(state(sequence=5, held=(("x", 4),)))
    book.report(state(sequence=4), 0.1)
    book.report(state(sequence=5), 0.1)
    assert charged(book) == 4


def test_a_new_life_of_a_replica_starts_empty_and_the_old_one_is_not_heard() -> None:
    book = ledger(state())
    book.reserve(wish("q"), 0.0)
    book.report(state(epoch=2), 0.1)
    assert charged(book) == 0
    book.report(state(epoch=1, sequence=99, held=(("x", 4),)), 0.2)
    assert charged(book) == 0
    book.check_integrity()


def test_an_untaken_grant_expires_only_after_the_last_report_that_could_list_it() -> None:
    book = ledger(state())
    grant = granted(book.reserve(wish("q"), 0.0))
    for second in range(1, 13):
        book.report(state(sequence=1 + second), float(second))
        book.tick(float(second))
    assert charged(book) == grant.blocks  # taken up at 9.99 s, the report may still be on its way
    book.tick(13.0)
    assert charged(book) == 0
    book.check_integrity()


def test_a_replica_is_sold_only_once_it_refuses_the_ledger_before() -> None:
    book = ledger(expected_replicas=1)
    assert book.report(state(ledger_epoch=0), 0.0) == EPOCH
    assert isinstance(book.reserve(wish("q"), 6.0), Refusal) is False
    assert not book.view(6.0).ready
    book.report(state(sequence=2), 6.1)
    (outcome,) = book.admit(6.1)
    assert granted(outcome).request_id == "q"


def test_a_new_ledger_waits_for_its_replicas_or_one_lease_time() -> None:
    book = ledger(state(), expected_replicas=2)
    assert isinstance(book.reserve(wish("q"), 1.0), Queued)
    assert book.tick(4.9) == []
    book.report(state(sequence=2), 4.9)
    book.renew_lease("in", 4.9)
    assert [granted(o).request_id for o in book.tick(5.1)] == ["q"]
    warm = ledger(state(), expected_replicas=2)
    warm.report(state("r1"), 0.1)
    granted(warm.reserve(wish("q"), 0.1))


@pytest.mark.parametrize(
    ("request_of", "kind", "words"),
    [
        (wish("q", prompt=160, output=1), "too_long", ["160 tokens", "longest context", "160"]),
        (wish("q", prompt=100, output=100), "too_long", ["200 tokens", "160", "max_tokens"]),
        (wish("q", pool="large"), "unknown_pool", ["'large'", "default"]),
        (wish("q", version=99), "version", ["protocol 99", f"reads {PROTOCOL_VERSION}", "rolling update"]),
    ],
)
def test_refusals_state_need_and_have(request_of: object, kind: str, words: list[str]) -> None:
    refusal = ledger(state()).reserve(request_of, 0.0)  # type: ignore[arg-type]  # some are wrong
    assert isinstance(refusal, Refusal)
    assert refusal.kind == kind
    assert all(word in refusal.message for word in words), refusal.message


def test_no_replica_is_refused_at_once_after_the_start() -> None:
    book = ledger(expected_replicas=1)
    assert isinstance(book.reserve(wish("early", wait_limit_s=60.0), 0.0), Queued)
    book.renew_lease("in", 4.0)
    assert book.tick(4.9) == []
    (early,) = book.tick(5.0)
    late = book.reserve(wish("late"), 5.1)
    for refusal in (early, late):
        assert isinstance(refusal, Refusal)
        assert refusal.kind == "no_replica"
        assert refusal.retry_after_s == 5


def test_a_draining_replica_is_not_sold() -> None:
    book = ledger(state(draining=True), state("r1"))
    assert {granted(book.reserve(wish(f"q{k}"), 0.0)).replica_id for k in range(3)} == {"r1"}


def test_a_pool_is_insisted_on() -> None:
    book = ledger(state(), state("r1", pool="int8", capacity_blocks=4, max_context=64), pools=("default", "int8"))
    assert granted(book.reserve(wish("q", pool="int8"), 0.0)).replica_id == "r1"
    assert granted(book.reserve(wish("p"), 0.0)).replica_id == "r0"
    refusal = book.reserve(wish("long", prompt=60, output=60, pool="int8"), 0.0)
    assert isinstance(refusal, Refusal)
    assert "64" in refusal.message


def test_output_lengths_are_learnt_once_each() -> None:
    book = ledger(state(capacity_blocks=1000, max_context=16000))
    for k in range(32):
        grant = granted(book.reserve(wish(f"q{k}", output=200), 0.0))
        ended = ((grant.grant_id, 16, 40),)
        for sequence in (2 * k + 2, 2 * k + 3):  # the answer to the first was lost
            book.report(state(sequence=sequence, capacity_blocks=1000, max_context=16000, ended=ended), 0.1)
        if k < 31:
            assert book.view(0.1).expected_output_tokens == 256
    assert book.view(0.1).expected_output_tokens == 40
    assert granted(book.reserve(wish("next", output=200), 0.2)).blocks == 4  # 16 + 40 tokens


def test_preemptions_are_learnt_from_once_each_and_not_those_of_an_earlier_life() -> None:
    book = ledger(state(preemptions=7))
    caution = book._lengths.caution
    begun = caution.percent
    book.report(state(sequence=2, preemptions=7), 0.1)
    assert caution.percent == begun
    for _ in range(2):  # the second is a duplicate
        book.report(state(sequence=3, preemptions=8), 0.2)
        assert caution.percent == begun + 25
    book.report(state(epoch=2, preemptions=0), 0.3)
    book.report(state(epoch=2, sequence=2, preemptions=0), 0.4)
    assert caution.percent == begun + 25


def test_another_protocol_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="protocol 99"):
        ledger(state(version=99))


def test_time_does_not_run_backwards() -> None:
    book = ledger(state(), now=100.0)
    assert granted(book.reserve(wish("q"), 50.0)).expires_at == 110.0


def test_integrity_check_finds_a_wrong_sum() -> None:
    book = ledger(state())
    book.reserve(wish("q"), 0.0)
    next(iter(book._fleet)).charged_blocks += 1
    with pytest.raises(AssertionError, match="charged 3 blocks, a fresh sum gives 2"):
        book.check_integrity()


def test_pairs_per_second() -> None:
    """The goal is 20,000 pairs/s; the bound here leaves room for a slow, shared machine."""
    book = ledger(*(state(f"r{k}", capacity_blocks=10_000) for k in range(8)))
    best = 0.0
    for turn in range(3):
        start = time.process_time()  # of this process alone, however busy the machine is
        for k in range(2000):
            book.release(granted(book.reserve(wish(f"q{turn}-{k}"), 1.0)).grant_id, 1.0)
        best = max(best, 2000 / (time.process_time() - start))
    assert best > 5_000, f"{best:.0f} pairs/s"
    book.check_integrity()


def test_news_name_the_longest_request_that_a_known_replica_holds() -> None:
    assert ledger().news().max_context is None
    small, large = state(), state("r1")
    book = ledger(small, replace(large, max_context=2 * large.max_context))
    assert book.news().max_context == 2 * large.max_context


def test_news_tells_what_an_ingress_needs_to_place_requests_by_itself() -> None:
    book = ledger(state("a"), state("b"), state("c", draining=True))
    granted(book.reserve(wish("q"), 0.0))
    news = book.news()
    assert {(spot.replica_id, spot.pool, spot.epoch) for spot in news.spots} == {
        ("a", "default", 1),
        ("b", "default", 1),
    }
    assert sorted(spot.headroom_blocks for spot in news.spots) == [8, 10]
    assert (news.warming, news.silent, news.expected_output_tokens) == (False, (), 256)
