"""What requests hold, from one telling to the next."""

from __future__ import annotations

from deployments.engine.holdings import Holdings


def test_only_what_changed_is_told() -> None:
    holdings = Holdings()
    assert holdings.news([("a", 0), ("b", 2)]) == ((("a", 0), ("b", 2)), ()), "one that waits is told too"
    assert holdings.news([("a", 0), ("b", 2)]) == ((), ())
    assert holdings.news([("b", 1), ("a", 0), ("c", 3)]) == ((("b", 1), ("c", 3)), ())
    assert holdings.news([("c", 4)]) == ((("c", 4),), ("b", "a"))
    assert holdings.news([("a", 1), ("c", 4)]) == ((("a", 1),), ()), "an id may come back"


def test_all_that_was_told_adds_up_to_what_is_held() -> None:
    known: dict[str, int] = {}
    holdings = Holdings()
    for held in ({"a": 1}, {"a": 1, "b": 1}, {"b": 3, "c": 0}, {}, {"a": 1}):
        changed, gone = holdings.news(held.items())
        known = {key: blocks for key, blocks in known.items() if key not in gone} | dict(changed)
        assert known == held
