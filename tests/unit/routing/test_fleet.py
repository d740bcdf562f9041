from __future__ import annotations

import random
from collections import Counter

from deployments.routing.account import ReplicaAccount
from deployments.routing.fleet import Fleet
from deployments.routing.policy import Size, pick
from tests.unit.routing.worlds import state

SMALL = Size(16, 16, 32)


def account(replica: str, held: int = 0, **changes: object) -> ReplicaAccount:
    return ReplicaAccount(state(replica, held=((f"of {replica}", held),) if held else (), **changes), 0.0)


def fleet(*accounts: ReplicaAccount) -> Fleet:
    built = Fleet()
    for each in accounts:
        built.add(each)
        built.place(each, sold=True)
    return built


def names(found: list[ReplicaAccount]) -> list[str]:
    return sorted(each.state.replica_id for each in found)


def test_the_best_of_each_shelf() -> None:
    built = fleet(
        account("a", 5),
        account("b", 3),
        account("other pool", pool="int8"),
        account("other blocks", block_size=32),
        account("longer", 20, capacity_blocks=40, max_context=640),
    )
    rng = random.Random(0)
    assert names(built.best(SMALL, None, rng)) == ["b", "longer", "other blocks", "other pool"]
    assert names(built.best(SMALL, "int8", rng)) == ["other pool"]
    assert names(built.best(Size(300, 200, 400), None, rng)) == ["longer"]
    assert built.best(Size(300, 400, 400), None, rng) == []


def test_a_larger_one_of_the_same_context_does_not_stand_for_the_smaller_ones() -> None:
    """The policy is to compare them: where room is ample it is the fewest tokens held that win."""
    built = fleet(account("small"), account("large", 4, capacity_blocks=40))
    assert names(built.best(SMALL, None, random.Random(0))) == ["large", "small"]
    chosen = pick(built.best(SMALL, None, random.Random(0)), SMALL, random.Random(0))
    assert chosen is built.get("small")


def test_one_that_is_too_short_is_passed_over() -> None:
    built = fleet(account("roomy", capacity_blocks=9), account("full", 10, capacity_blocks=10))
    assert names(built.best(Size(100, 50, 120), None, random.Random(0))) == ["full"]
    built.check_integrity()


def test_what_is_to_be_computed_counts_like_room_taken() -> None:
    built = fleet(*(account(name, held) for name, held in (("a", 0), ("b", 2), ("c", 3))))
    for name, ahead, best in (("a", 31, "a"), ("a", 49, "b"), ("b", 17, "c"), ("b", 15, "b")):
        found = built.get(name)
        assert found is not None
        found.ahead_tokens = ahead
        assert names(built.best(SMALL, None, random.Random(0))) == [best]
    large = Size(16, 16, 9 * 16)  # has room on a alone
    assert names(built.best(large, None, random.Random(0))) == ["a"]


def test_equals_are_drawn_at_random() -> None:
    built = fleet(*(account(name, 2) for name in "abc"), account("d", 3))
    rng = random.Random(0)
    drawn = Counter(built.best(SMALL, None, rng)[0].state.replica_id for _ in range(300))
    assert set(drawn) == {"a", "b", "c"}
    assert min(drawn.values()) > 60


def test_sums_follow_changes() -> None:
    one, two, other = account("a", 4), account("b", 12, capacity_blocks=10), account("c", 1, pool="int8")
    built = fleet(one, two, other)
    assert (built.free_tokens(None), built.free_tokens("default"), built.free_tokens("none")) == (240, 96, 0)
    assert (built.longest_tokens(None), built.longest_tokens("none")) == (160, 0)
    assert (built.alive(None), built.alive("default"), built.alive("none")) == (3, 2, 0)
    one.alive = False
    assert built.place(one, sold=False)
    assert (built.free_tokens("default"), built.alive("default"), built.longest_tokens("default")) == (0, 1, 160)
    built.check_integrity()
    assert built.remove("a") is one
    assert built.remove("a") is None
    assert built.alive("default") == 1
    built.check_integrity()


def test_only_what_may_help_those_who_wait_is_news() -> None:
    one = account("a", 4)
    built = Fleet()
    built.add(one)
    assert built.place(one, sold=True)
    assert not built.place(one, sold=True)
    one.charged_blocks += 1
    assert not built.place(one, sold=True)
    one.charged_blocks -= 1
    assert built.place(one, sold=True)
    assert built.place(one, sold=False)
    one.alive = False
    assert built.place(one, sold=False)


def test_a_replica_that_is_kept_is_out_of_the_choice_until_it_is_given_back() -> None:
    one = account("a")
    built = fleet(one)
    built.keep(one)
    assert built.best(SMALL, None, random.Random(0)) == []
    assert (built.is_open("a"), built.is_sold(one), built.free_tokens(None)) == (False, True, 0)
    one.charged_blocks += 3
    built.place(one, sold=True)
    assert not built.is_open("a")
    built.check_integrity()
    built.give_back(one)
    assert built.is_open("a")
    assert built.free_tokens(None) == 7 * 16
    built.keep(one)
    built.remove("a")
    again = account("a", epoch=2)
    built.add(again)
    built.place(again, sold=True)
    built.give_back(one)  # its former life: changes nothing
    assert built.best(SMALL, None, random.Random(0)) == [again]
    assert not built.is_sold(one)
    built.check_integrity()
