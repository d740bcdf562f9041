from __future__ import annotations

import time
from dataclasses import replace

import pytest

from deployments.protocol import (
    PROTOCOL_VERSION,
    CachedGranules,
    Grant,
    IngressNotice,
    Prefix,
    Refusal,
    ReplicaState,
    ReserveRequest,
)
from deployments.routing.forecast import ForecastError
from deployments.routing.growth import ScaledPool
from deployments.routing.ledger import Ledger, Queued
from deployments.routing.turns import Outcome
from tests.unit.routing.worlds import EPOCH, granted, ledger, state, wish


def charged(book: Ledger, replica: str = "r0") -> int:
    return next(r.charged_blocks for r in book.view(0.0).replicas if r.replica_id == replica)


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


def test_a_full_queue_refuses_with_a_forecast() -> None:
    book = ledger(state(), queue_limit=1)
    whole = granted(book.reserve(wish("a", prompt=100, output=60), 0.0))
    assert isinstance(book.reserve(wish("b"), 0.0), Queued)
    refusal = book.reserve(wish("c"), 0.0)
    assert isinstance(refusal, Refusal)
    assert refusal.kind == "queue_full"
    assert refusal.retry_after_s == 15
    assert "queue_limit is 1" in refusal.message
    book.release(whole.grant_id, 1.0)  # 160 tokens in about a second
    book.admit(1.0)
    granted(book.reserve(wish("d", prompt=100, output=20), 1.0))
    book.reserve(wish("e"), 1.0)
    refusal = book.reserve(wish("f"), 1.0)
    assert isinstance(refusal, Refusal)
    assert refusal.retry_after_s == 1


def finish(book: Ledger, grant: Grant, sequence: int, now: float) -> list[str]:
    """The replica says that a request has ended; returns who is granted what became free."""
    book.report(state(sequence=sequence, ended=((grant.grant_id, 1, 1),)), now)
    return [granted(outcome).request_id for outcome in book.admit(now)]


def test_a_small_request_passes_a_large_one_that_waits_for_room() -> None:
    book = ledger(state())
    granted(book.reserve(wish("a", prompt=100, output=28), 0.0))  # 8 of 10 blocks
    assert isinstance(book.reserve(wish("large", prompt=100, output=40), 0.0), Queued)
    assert granted(book.reserve(wish("small"), 0.1)).blocks == 2
    assert isinstance(book.reserve(wish("next"), 0.2), Queued)
    assert book.admit(0.3) == []
    book.check_integrity()


def test_a_prompt_is_ahead_until_a_second_report_lists_it() -> None:
    built = ledger(state("r0"), state("r1"))
    first = granted(built.reserve(wish("first", prompt=100), 0.0))
    account = built._fleet.get(first.replica_id)
    assert account is not None
    other = granted(built.reserve(wish("other"), 0.0))
    assert other.replica_id != first.replica_id
    for sequence, ahead in ((2, 100), (3, 0)):
        built.report(state(first.replica_id, sequence, held=((first.grant_id, first.blocks),)), 0.1 * sequence)
        assert account.ahead_tokens == ahead
    built.report(state(first.replica_id, 4, ended=((first.grant_id, 100, 1),)), 0.5)
    assert granted(built.reserve(wish("third"), 0.5)).replica_id == first.replica_id
    assert account.ahead_tokens == 16
    built.check_integrity()


def test_replicas_are_asked_for_ends_the_sooner_the_fewer_they_are() -> None:
    few, many = ledger(state("r0")), ledger(*(state(f"r{k}") for k in range(50)))
    for built, replicas in ((few, 1), (many, 50)):
        assert built.end_within_ms() is None
        for k in range(5 * replicas + 1):
            built.reserve(wish(f"q{k}"), 0.0)
        assert built.end_within_ms() == 2 * replicas
        built.cancel(f"q{5 * replicas}", 0.0)
        assert built.end_within_ms() is None


def test_what_passes_a_large_request_is_bounded_by_the_longest_request_there_can_be() -> None:
    """Small requests of 2 blocks keep coming; the large one needs 9 of the 10 blocks, and lets 10 blocks pass it."""
    book = ledger(state())
    running = [granted(book.reserve(wish(f"s{k}"), 0.0)) for k in range(5)]
    assert isinstance(book.reserve(wish("large", prompt=100, output=44, wait_limit_s=1e6), 0.0), Queued)
    passed, sequence = 0, 1
    for k in range(100):
        assert isinstance(book.reserve(wish(f"t{k}", wait_limit_s=1e6), 0.0), Queued)
    while True:
        sequence += 1
        served = finish(book, running.pop(0), sequence, 0.1)
        if "large" in served:
            break
        for key in served:
            passed += 2
            grant_id = book._books._grants.of_request(key)
            assert grant_id is not None
            running.append(next(iter(book._fleet)).promises[grant_id].grant)
    assert passed == 10
    assert book.view(0.1).waiting == 95
    book.check_integrity()


def test_the_replica_kept_for_a_large_request_is_given_back_when_it_leaves() -> None:
    book = ledger(state())
    whole = [granted(book.reserve(wish(f"s{k}", prompt=64, output=16), 0.0)) for k in range(2)]  # 5 blocks each
    book.reserve(wish("large", prompt=100, output=44), 0.0)
    for k in range(3):
        book.reserve(wish(f"t{k}", prompt=64, output=16), 0.0)
    assert finish(book, whole[0], 2, 0.1) == ["t0"]
    assert finish(book, whole[1], 3, 0.2) == ["t1"]  # 160 tokens have passed the large one
    first = book._books._grants.of_request("t0")
    assert first is not None
    book.report(state(sequence=4, ended=((first, 1, 1),)), 0.3)
    assert book.admit(0.3) == []
    book.check_integrity()
    book.cancel("large", 0.4)
    assert [granted(outcome).request_id for outcome in book.admit(0.4)] == ["t2"]
    book.check_integrity()


def test_another_replica_is_kept_when_the_first_is_lost() -> None:
    book = ledger(state(), state("r1"))
    holds = {g.replica_id: g for g in (granted(book.reserve(wish(f"s{k}", 100, 60), 0.0)) for k in range(2))}
    book.reserve(wish("large", prompt=100, output=44, wait_limit_s=60), 0.0)
    for k in range(9):
        book.reserve(wish(f"t{k}", wait_limit_s=60), 0.0)
    book.release(holds["r0"].grant_id, 0.1)
    assert [granted(o).request_id for o in book.admit(0.1)] == ["large"]
    book.reserve(wish("large too", prompt=100, output=44, wait_limit_s=60), 0.2)
    assert book.admit(0.2) == []
    for waiter in book._queue.firsts():
        waiter.passed_tokens = 160
    book.release("none", 0.2)
    book.replica_gone("r0", 1)
    book.admit(0.3)
    kept = {key: account.state.replica_id for key, (_, account) in book._turns._kept_for.items()}
    assert set(kept.values()) == {"r1"}
    book.replica_gone("r1", 1)
    book.report(state(sequence=2), 0.4)
    book.admit(0.4)
    book.check_integrity()
    assert {account.state.replica_id for _, account in book._turns._kept_for.values()} == {"r0"}


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


def test_a_request_that_outgrows_its_promise_is_charged_for_what_is_to_come() -> None:
    shape = {"capacity_blocks": 1000, "max_context": 16000}
    book = ledger(state(**shape))
    for k in range(40):
        grant = granted(book.reserve(wish(f"q{k}", output=1000), 0.0))
        book.report(state(sequence=2 + k, ended=((grant.grant_id, 16, 40 if k < 36 else 400),), **shape), 0.1)
    grant = granted(book.reserve(wish("long", output=1000), 0.2))
    assert grant.blocks == 4  # 16 + 40 tokens
    book.report(state(sequence=50, held=((grant.grant_id, 4),), **shape), 0.3)
    assert charged(book) == 4
    book.report(state(sequence=51, held=((grant.grant_id, 5),), **shape), 0.4)
    assert charged(book) == 26  # 16 + 400 tokens: those that got over 64 went on to 400
    book.report(state(sequence=52, held=((grant.grant_id, 30),), **shape), 0.5)
    assert charged(book) == 33  # none got over 464: another 40, 520 tokens with the prompt
    book.check_integrity()
    book.report(state(sequence=53, ended=((grant.grant_id, 16, 470),), **shape), 0.6)
    assert charged(book) == 0


def test_a_report_of_another_size_in_one_epoch_is_refused() -> None:
    book = ledger(state())
    with pytest.raises(ValueError, match="another size needs another epoch"):
        book.report(state(sequence=2, capacity_blocks=20), 0.1)


def test_the_forecast_is_held_against_the_wait() -> None:
    book = ledger(state())
    whole = granted(book.reserve(wish("a", prompt=100, output=60), 0.0))
    book.reserve(wish("b", wait_limit_s=60), 0.0)
    book.reserve(wish("leaves", wait_limit_s=60), 0.0)
    assert book.view(0.0).forecast == ForecastError()
    book.cancel("leaves", 1.0)
    assert finish(book, whole, 2, 2.5) == ["b"]
    assert book.view(2.5).forecast == ForecastError(1, 15_000, 2_500, 12_500)
    assert book.view(2.5).forecast.percent == 500


def test_deadlines_and_cancellation() -> None:
    book = ledger(state())
    granted(book.reserve(wish("a", prompt=100, output=60), 0.0))
    book.reserve(wish("leaves"), 0.0)
    book.reserve(wish("late", wait_limit_s=1.0), 0.0)
    with pytest.raises(ValueError, match="waits already"):
        book.reserve(wish("late"), 0.0)
    book.cancel("leaves", 0.5)
    (refusal,) = book.tick(1.0)
    assert isinstance(refusal, Refusal)
    assert (refusal.request_id, refusal.kind) == ("late", "deadline")
    assert "wait_limit_s" in refusal.message
    assert book.tick(9.0) == []
    book.check_integrity()


def test_cancelling_a_request_whose_answer_is_on_its_way_gives_the_grant_back() -> None:
    book = ledger(state())
    book.reserve(wish("q"), 0.0)
    book.cancel("q", 0.1)
    assert charged(book) == 0
    book.cancel("q", 0.1)
    book.check_integrity()


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


def test_less_is_promised_only_when_requests_end_while_others_wait() -> None:
    book = ledger(state())
    caution = book._lengths.caution
    first, second = (granted(book.reserve(wish(key, 48, 32), 0.0)) for key in ("a", "b"))
    finish(book, first, 2, 0.1)
    assert caution.percent == 50
    for key in ("c", "d"):
        book.reserve(wish(key, 64, 32), 0.2)
    assert len(book._queue) == 2
    finish(book, second, 3, 0.3)
    assert caution.percent == 49  # 50 less a fortieth, rounded down


def test_revoked_grants_held_nobody_back() -> None:
    book = ledger(state())
    left = granted(book.reserve(wish("a", 130, 16), 0.0))
    book.revoke(left.grant_id)
    book.reserve(wish("b", 64, 32), 0.1)
    assert len(book._queue) == 1
    book.report(state(sequence=2, ended=((left.grant_id, 0, 0),)), 0.2)
    assert charged(book) == 0
    assert book._lengths.caution.percent == 50


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


def test_news_names_replicas_that_fell_silent_and_not_those_that_were_lost() -> None:
    book = ledger(state("a"), state("b"), state("c"))
    book.replica_gone("c", 1)
    book.report(state("b", 2), 4.0)
    book.report(state("c", 2), 4.0)
    book.replica_gone("c", 1)
    book.tick(4.0)
    assert book.news().silent == (("a", 1),)
    assert [spot.replica_id for spot in book.news().spots] == ["b"]


FROM_NONE = ScaledPool("default", min_replicas=0, max_replicas=2, upscale_delay_s=10.0)


def test_with_no_replica_a_request_waits_where_one_may_be_started() -> None:
    book = ledger(scaled=(FROM_NONE,))
    assert book.view(0.0).ready, "a request would be served"
    assert isinstance(book.reserve(wish("q", prompt=100, output=16), 0.0), Queued)
    assert (book.news().wake, book.waiting_tokens("default")) == (("default",), 116)
    assert book.admit(0.5) == []
    book.report(state(), 1.0)
    assert [granted(outcome).request_id for outcome in book.admit(1.0)] == ["q"]
    assert (book.news().wake, book.waiting_tokens("default")) == ((), 0)
    book.check_integrity()


def test_a_wait_for_a_first_replica_has_its_deadline() -> None:
    book = ledger(scaled=(FROM_NONE,))
    book.reserve(wish("q", wait_limit_s=4.0), 0.0)
    (refusal,) = book.tick(4.0)
    assert isinstance(refusal, Refusal)
    assert (refusal.kind, refusal.message[:43]) == ("deadline", "no replica of m was ready within 4 s (wait_")
    assert refusal.retry_after_s is not None
    assert book.news().wake == ()


def test_a_request_too_long_for_the_replica_that_was_last_there_is_refused_without_one() -> None:
    book = ledger(state(), scaled=(FROM_NONE,))
    book.tick(30.0)  # it was stopped, and is forgotten
    assert book.view(30.0).replicas == ()
    assert book.news().pool_contexts == (("default", 160),)
    assert isinstance(book.reserve(wish("fits", prompt=100, output=60), 30.0), Queued)
    refusal = book.reserve(wish("long", prompt=100, output=61), 30.0)
    assert isinstance(refusal, Refusal)
    assert refusal.kind == "too_long"
    assert "160" in refusal.message


def test_what_waited_in_vain_for_a_first_replica_turns_out_too_long() -> None:
    book = ledger(scaled=(FROM_NONE,))
    book.reserve(wish("q", prompt=100, output=61), 0.0)
    book.report(state(), 1.0)
    (refusal,) = book.admit(1.0)
    assert isinstance(refusal, Refusal)
    assert refusal.kind == "too_long"


def test_a_request_too_long_for_the_small_pool_goes_to_the_large_one() -> None:
    roomy = state("r1", pool="large", capacity_blocks=40, max_context=640)
    book = ledger(state(), roomy, pools=("default", "large"))
    assert granted(book.reserve(wish("long", prompt=200, output=60), 0.0)).replica_id == "r1"
    full = granted(book.reserve(wish("fill", prompt=300, output=60), 0.0))
    assert full.replica_id == "r1"
    assert isinstance(book.reserve(wish("longer", prompt=200, output=60), 0.0), Queued), "it waits for the large one"


def test_a_long_request_waits_for_the_large_pool_that_has_no_replica() -> None:
    large = ScaledPool("large", min_replicas=0, max_replicas=1, upscale_delay_s=10.0)
    book = ledger(state(), pools=("default", "large"), scaled=(large,))
    assert granted(book.reserve(wish("short"), 0.0)).pool == "default"
    assert isinstance(book.reserve(wish("long", prompt=200, output=60), 0.0), Queued)
    assert book.news().wake == ("large",)
    insists = book.reserve(wish("insists", prompt=200, output=60, pool="default"), 0.0)
    assert isinstance(insists, Refusal)
    assert insists.kind == "too_long"


SMALL = state("small", pool="small", capacity_blocks=1_000, max_context=4_096)
LARGE = state("large", pool="large", capacity_blocks=10_000, max_context=65_536)
POOLS = ("small", "large")


def without_large_for_20_s() -> Ledger:
    book = ledger(SMALL, LARGE, pools=POOLS)
    for second in range(1, 21):
        book.report(replace(SMALL, sequence=1 + second), float(second))
        book.tick(float(second))
    assert [replica.replica_id for replica in book.view(20.0).replicas] == ["small"], "the large one is forgotten"
    return book


def refused(outcome: object) -> tuple[str, int | None]:
    """Kind and seconds to wait of an outcome that must be a refusal."""
    assert isinstance(outcome, Refusal), outcome
    return outcome.kind, outcome.retry_after_s


def test_what_only_a_silent_fixed_pool_holds_is_never_too_long() -> None:
    book = without_large_for_20_s()
    granted(book.reserve(wish("short"), 20.0))
    for pool in (None, "large"):
        outcome = book.reserve(wish("long", prompt=20_000, output=100, pool=pool), 20.0)
        assert refused(outcome) == ("no_replica", 5)
    assert refused(book.reserve(wish("small", prompt=20_000, pool="small"), 20.0))[0] == "too_long"
    nobody = book.reserve(wish("nobody", prompt=65_536), 20.0)
    assert refused(nobody)[0] == "too_long"
    assert isinstance(nobody, Refusal)
    assert "65536" in nobody.message


def test_news_remember_what_a_silent_fixed_pool_holds() -> None:
    news = without_large_for_20_s().news()
    assert (news.max_context, news.pool_contexts) == (65_536, (("large", 65_536), ("small", 4_096)))


def test_news_tell_the_longest_that_is_served_now_apart() -> None:
    book = ledger(SMALL, LARGE, pools=POOLS)
    assert book.news().living_contexts == (("large", 65_536), ("small", 4_096))
    book.report(replace(LARGE, sequence=2, draining=True), 0.1)
    assert (book.news().living_contexts, book.news().max_context) == ((("small", 4_096),), 65_536)
    book.report(replace(SMALL, sequence=2, draining=True), 0.1)
    assert book.news().living_contexts == ()
    assert without_large_for_20_s().news().living_contexts == (("small", 4_096),)
    assert ledger(SMALL, expected_replicas=2, pools=POOLS).news().living_contexts == (), "it waits for the large one"


@pytest.mark.parametrize("later", [2, 3])
def test_whichever_replica_of_a_pool_came_last_news_tell_the_largest_and_what_each_holds(later: int) -> None:
    large = state("a", epoch=later, capacity_blocks=625, max_context=10_000)
    small = state("b", epoch=2, capacity_blocks=500, max_context=8_000)
    book = ledger(*((large, small) if later == 2 else (small, large)))
    assert (book.news().max_context, book.news().pool_contexts) == (10_000, (("default", 10_000),))
    assert book.news().living_contexts == (("default", 8_000),)
    book.replica_gone("b", 2)
    assert book.news().living_contexts == (("default", 10_000),), "what can take work now"
    book.report(replace(small, sequence=2), 0.1)
    book.replica_gone("a", later)
    assert (book.news().max_context, book.news().living_contexts) == (10_000, (("default", 8_000),))


def test_a_wait_for_a_pool_that_is_forgotten_ends_without_a_replica() -> None:
    book = ledger(SMALL, LARGE, pools=POOLS)
    book.replica_gone("large", 1)
    assert isinstance(book.reserve(wish("long", prompt=20_000, wait_limit_s=60.0), 0.0), Queued)
    answers = []
    for second in range(1, 21):
        book.report(replace(SMALL, sequence=1 + second), float(second))
        book.renew_lease("in", float(second))
        answers += book.tick(float(second))
    assert [refused(outcome)[0] for outcome in answers] == ["no_replica"]


def test_nothing_is_too_long_for_a_fixed_pool_of_which_no_replica_was_heard() -> None:
    book = ledger(SMALL, expected_replicas=2, pools=POOLS)
    book.tick(5.0)  # the large one is still loading
    book.report(replace(SMALL, sequence=2), 5.0)
    granted(book.reserve(wish("short"), 5.0))
    assert refused(book.reserve(wish("long", prompt=20_000), 5.0)) == ("no_replica", 5)
    assert refused(book.reserve(wish("small", prompt=20_000, pool="small"), 5.0))[0] == "too_long"
    assert (book.news().max_context, book.news().pool_contexts) == (None, (("small", 4_096),))
    book.report(LARGE, 6.0)
    assert book.news().max_context == 65_536
    assert granted(book.reserve(wish("long", prompt=20_000), 6.0)).replica_id == "large"


def flooded(flood: int = 8, queue_limit: int = 8, **changes: object) -> Ledger:
    """The only replica is full, and so is the queue of 8, with requests of one tenant."""
    book = ledger(state(), queue_limit=queue_limit, **changes)  # type: ignore[arg-type]  # fields by name
    granted(book.reserve(wish("running", prompt=100, output=60), 0.0))
    for k in range(flood):
        assert isinstance(book.reserve(wish(f"f{k}", tenant="flood"), 0.0), Queued)
    return book


def told(outcomes: list[Outcome]) -> list[tuple[str, str]]:
    """(request, kind) of outcomes that must be refusals with a time to wait."""
    assert all(isinstance(outcome, Refusal) and outcome.retry_after_s for outcome in outcomes), outcomes
    return [(outcome.request_id, outcome.kind) for outcome in outcomes if isinstance(outcome, Refusal)]


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
