from __future__ import annotations

from dataclasses import dataclass, field

from deployments.routing.growth import Growth, ScaledPool, Waiting
from tests.unit.routing.worlds import state

SMALL = ScaledPool("small", min_replicas=0, max_replicas=2, upscale_delay_s=10.0)
LARGE = ScaledPool("large", min_replicas=1, max_replicas=1, upscale_delay_s=10.0)


@dataclass
class FakeFleet:
    """Replicas alive and sold by pool, and the longest request that any holds."""

    replicas: dict[str, int] = field(default_factory=dict)
    longest: int = 0

    def alive(self, pool: str | None) -> int:
        return self.sold(pool)

    def sold(self, pool: str | None) -> int:
        return sum(number for name, number in self.replicas.items() if pool in (None, name))

    def longest_tokens(self, pool: str | None) -> int:
        return self.longest if self.sold(pool) else 0


def known() -> Growth:
    """Small replicas hold 160 tokens, large ones 320."""
    growth = Growth((SMALL, LARGE))
    growth.learn(state(pool="small"))
    growth.learn(state(pool="large", capacity_blocks=20, max_context=400))
    growth.learn(state(pool="fixed", capacity_blocks=99, max_context=9999))
    return growth


def waiting(growth: Growth, fleet: FakeFleet, *lines: Waiting) -> tuple[int, int]:
    return growth.waiting_tokens("small", lines, fleet), growth.waiting_tokens("large", lines, fleet)


def test_what_waits_counts_once_for_the_first_pool_that_holds_it_and_may_grow() -> None:
    short, long = Waiting(None, 160, 50), Waiting(None, 161, 70)
    assert waiting(known(), FakeFleet(), short, long) == (50, 70)
    assert waiting(known(), FakeFleet({"small": 2}), short, long) == (0, 120), "a full pool leaves it to the next"
    assert waiting(known(), FakeFleet({"small": 2, "large": 1}), short, long) == (0, 0)
    assert known().waiting_tokens("fixed", [short], FakeFleet()) == 0


def test_who_insists_on_a_pool_waits_for_that_one() -> None:
    assert waiting(known(), FakeFleet(), Waiting("large", 10, 5), Waiting("fixed", 10, 7)) == (0, 5)


def test_a_bound_that_no_pool_holds_counts_for_the_largest() -> None:
    assert waiting(known(), FakeFleet(), Waiting(None, 500, 9)) == (0, 9)


def test_a_pool_that_never_had_a_replica_may_hold_anything() -> None:
    new = Growth((SMALL,))
    assert new.may_hold(None, 10**6)
    assert new.contexts({}) == {}
    new.learn(state(pool="small"))
    assert new.may_hold("small", 160)
    assert not new.may_hold("small", 161)
    assert not new.may_hold("other", 1)
    assert new.contexts({}) == {"small": 160}
    assert new.contexts({"small": 320, "fixed": 64}) == {"fixed": 64, "small": 320}, "those that are known, first"


def test_the_first_replica_is_wanted_at_once_where_nobody_else_serves() -> None:
    growth, line = known(), Waiting(None, 100, 50)
    assert growth.to_wake([], FakeFleet(), 0.0) == ()
    assert growth.to_wake([line], FakeFleet(), 0.0) == ("small",)
    assert growth.to_wake([line], FakeFleet({"small": 1}), 0.0) == (), "Serve's policy starts the second one"
    assert growth.to_wake([line], FakeFleet({"fixed": 1}, longest=99), 0.0) == ("small",), "it can't hold it"


def test_where_others_serve_it_is_wanted_after_the_delay() -> None:
    growth, line, others = known(), Waiting(None, 100, 50), FakeFleet({"fixed": 1}, longest=100)
    assert growth.to_wake([line], others, 0.0) == ()
    assert growth.to_wake([line], others, 9.9) == ()
    assert growth.to_wake([line], others, 10.0) == ("small",)
    assert growth.to_wake([], others, 11.0) == ()
    assert growth.to_wake([line], others, 12.0) == (), "the wait began anew"
