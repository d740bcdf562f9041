from __future__ import annotations

from deployments.protocol import LedgerNews
from deployments.routing.contexts import Contexts

BOTH = LedgerNews(
    7,
    4_096,
    pool_contexts=(("large", 4_096), ("small", 300)),
    living_contexts=(("large", 1_000), ("small", 200)),
)


def told(*news: LedgerNews) -> Contexts:
    contexts = Contexts()
    for each in news:
        contexts.hear(each)
    return contexts


def seen(contexts: Contexts) -> tuple[int | None, int | None, int | None, int | None, int | None]:
    return contexts.longest, contexts.of("large"), contexts.of("small"), contexts.living(None), contexts.living("small")


def test_nothing_is_known_before_the_ledger_has_heard_of_replicas() -> None:
    nothing = (None,) * 5
    assert seen(Contexts()) == nothing
    assert seen(told(LedgerNews(7, 300, pool_contexts=(("small", 300),), warming=True))) == nothing


def test_the_longest_and_what_can_go_to_any_replica() -> None:
    assert seen(told(BOTH)) == (4_096, 4_096, 300, 1_000, 200)


def test_what_a_new_ledger_does_not_know_is_remembered() -> None:
    warming = LedgerNews(8, None, warming=True)
    assert seen(told(BOTH, warming)) == seen(told(BOTH))
    small = LedgerNews(8, None, pool_contexts=(("small", 310),), living_contexts=(("small", 210),))
    assert seen(told(BOTH, warming, small)) == (4_096, 4_096, 310, 210, 210)


def test_where_none_can_take_work_it_is_the_largest_that_is_known() -> None:
    """Also while one pool never had a replica, so that nobody knows the longest."""
    one = LedgerNews(7, None, pool_contexts=(("small", 300),))
    assert seen(told(one)) == (None, None, 300, 300, 300)
    assert told(one).living("large") is None
    silent = LedgerNews(7, 4_096, pool_contexts=BOTH.pool_contexts, living_contexts=(("large", 1_000),))
    assert told(silent).living("small") == 300
