from __future__ import annotations

from deployments.protocol import CachedGranules, Prefix
from deployments.routing.prefixes import NO_MATCH, Match, PrefixMap

PROMPT = Prefix(64, (1, 2, 3))


def known(**replicas: CachedGranules) -> PrefixMap:
    built = PrefixMap()
    for replica_id, news in replicas.items():
        built.hear(replica_id, news)
    built.check_integrity()
    return built


def test_a_match_ends_at_the_first_granule_that_is_not_there() -> None:
    prefixes = known(a=CachedGranules(used=(1,), idle=(2, 9)), b=CachedGranules(idle=(1, 2, 3)))
    assert prefixes.match(PROMPT, "a") == Match(used_tokens=64, cached_tokens=128, last_used=1)
    assert prefixes.match(PROMPT, "b") == Match(used_tokens=0, cached_tokens=192)
    assert prefixes.match(PROMPT, "unknown") == NO_MATCH
    assert prefixes.match(Prefix(64, ()), "a") == NO_MATCH


def test_holders_of_more_come_first() -> None:
    prefixes = known(a=CachedGranules(idle=(1,)), b=CachedGranules(used=(1, 2, 3)), c=CachedGranules(idle=(1, 2)))
    assert prefixes.holders(PROMPT, 9) == ["b", "c", "a"]
    assert prefixes.holders(PROMPT, 2) == ["b", "c"]
    assert prefixes.holders(Prefix(64, (7,)), 9) == []


def test_news_change_what_is_known_and_a_whole_report_replaces_it() -> None:
    prefixes = known(a=CachedGranules(used=(1, 2), idle=(3,)))
    prefixes.hear("a", CachedGranules(used=(3,), idle=(2,), gone=(8,)))
    assert prefixes.match(PROMPT, "a") == Match(64, 192, 1)
    prefixes.hear("a", CachedGranules(gone=(3, 2)))
    assert prefixes.match(PROMPT, "a") == Match(64, 64, 1)
    prefixes.hear("a", CachedGranules(whole=True, idle=(1,)))
    assert prefixes.match(PROMPT, "a") == Match(0, 64)
    assert 1 not in prefixes.used("a")
    prefixes.forget("a")
    prefixes.check_integrity()
    assert prefixes.holders(PROMPT, 9) == []
