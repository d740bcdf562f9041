from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

from deployments.protocol import LOCAL_EPOCH, LedgerNews, ReplicaSpot
from deployments.routing.local import LocalPlacement
from tests.unit.routing.worlds import granted, wish

SPOT = ReplicaSpot("r0", "default", 3, 16, 100, 80, 1600)


def placement(*spots: ReplicaSpot, expected: int = 16, seed: int = 0) -> LocalPlacement:
    built = LocalPlacement("in", random.Random(seed))
    built.hear(LedgerNews(7, 1600, expected_output_tokens=expected, spots=spots))
    return built


def named(*headrooms: int) -> list[ReplicaSpot]:
    return [replace(SPOT, replica_id=f"r{k}", headroom_blocks=blocks) for k, blocks in enumerate(headrooms)]


def test_a_local_grant_says_that_no_ledger_made_it() -> None:
    grant = granted(placement(SPOT).place(wish("q", prompt=20, output=100), now=5.0))
    assert (grant.request_id, grant.replica_id, grant.replica_epoch, grant.pool) == ("q", "r0", 3, "default")
    assert grant.ledger_epoch == LOCAL_EPOCH
    assert grant.blocks == 3  # 20 prompt tokens and 16 expected ones
    assert grant.expires_at > 5.0


def test_ids_differ() -> None:
    local = placement(SPOT)
    assert len({granted(local.place(wish("q"), 0.0)).grant_id for _ in range(20)}) == 20


def test_of_two_the_roomier_is_asked_and_what_was_placed_counts() -> None:
    local = placement(*named(10, 40))
    chosen = Counter(granted(local.place(wish("q"), 0.0)).replica_id for _ in range(20))
    assert chosen["r1"] >= 16  # 2 blocks each: r1 has more left for the first 15
    assert chosen["r0"] >= 2


def test_placements_spread_over_many() -> None:
    local = placement(*named(*[80] * 10))
    chosen = Counter(granted(local.place(wish("q"), 0.0)).replica_id for _ in range(200))
    assert len(chosen) == 10
    assert max(chosen.values()) <= 30


def test_what_ended_or_was_refused_counts_no_more() -> None:
    local = placement(*named(40, 38), seed=1)
    for _ in range(50):
        grant = granted(local.place(wish("q"), 0.0))
        assert grant.replica_id == "r0"
        local.ended(grant.grant_id)
        local.ended(grant.grant_id)
    local.ended("a ledger's")


def test_a_full_replica_is_asked_all_the_same_because_news_is_old() -> None:
    assert granted(placement(replace(SPOT, headroom_blocks=0)).place(wish("q"), 0.0)).replica_id == "r0"


def test_a_replica_at_its_most_requests_has_no_room() -> None:
    roomy, other = replace(SPOT, requests_left=3), replace(SPOT, replica_id="r1", headroom_blocks=20)
    local = placement(roomy, other)
    grants = [granted(local.place(wish("q"), 0.0)) for _ in range(6)]
    assert [grant.replica_id for grant in grants] == ["r0"] * 3 + ["r1"] * 3
    local.ended(grants[0].grant_id)
    assert [granted(local.place(wish("q"), 0.0)).replica_id for _ in range(2)] == ["r0", "r1"]
    local.hear(LedgerNews(7, 1600, expected_output_tokens=16, spots=(replace(roomy, requests_left=1), other)))
    assert [granted(local.place(wish("q"), 0.0)).replica_id for _ in range(2)] == ["r0", "r1"]


def test_only_where_it_fits_ever_and_in_its_pool() -> None:
    small, large = replace(SPOT, max_context=100), replace(SPOT, replica_id="r1", pool="large", headroom_blocks=1)
    local = placement(small, large)
    long = wish("q", prompt=100, output=100)
    assert {granted(local.place(long, 0.0)).replica_id for _ in range(20)} == {"r1"}
    assert local.place(replace(long, pool="default"), 0.0) is None
    assert granted(local.place(wish("q", pool="default"), 0.0)).replica_id == "r0"


def test_a_lost_replica_is_not_asked_until_the_ledger_names_it_again() -> None:
    local = placement(*named(80, 80))
    local.lost("r0")
    local.lost("unknown")
    assert {granted(local.place(wish("q"), 0.0)).replica_id for _ in range(20)} == {"r1"}
    local.lost("r1")
    assert local.place(wish("q"), 0.0) is None
    assert not local.knows_a_replica
    local.hear(LedgerNews(8, 1600, expected_output_tokens=16, spots=(SPOT,)))
    assert granted(local.place(wish("q"), 0.0)).replica_id == "r0"


def test_a_new_ledger_that_knows_nothing_yet_does_not_make_us_forget() -> None:
    local = placement(SPOT)
    local.hear(LedgerNews(8, None, warming=True))
    assert local.knows_a_replica
    local.hear(LedgerNews(8, None))
    assert not local.knows_a_replica
