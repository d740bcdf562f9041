"""Pools without a replica, of one size and of several."""

from __future__ import annotations

from dataclasses import replace

import pytest

from deployments.protocol import (
    Refusal,
)
from deployments.routing.growth import ScaledPool
from deployments.routing.ledger import Ledger, Queued
from tests.unit.routing.worlds import granted, ledger, refused, state, wish

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
