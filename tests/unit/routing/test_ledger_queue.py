"""Who waits in the ledger's queue, in which order, and for how long."""

from __future__ import annotations

import pytest

from deployments.protocol import (
    Refusal,
)
from deployments.routing.forecast import ForecastError
from deployments.routing.ledger import Queued
from tests.unit.routing.worlds import charged, finish, granted, ledger, state, wish


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
