"""Grants to requests whose prefix is cached: where they go, what they cost, and what when sharing comes to nothing."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from deployments.protocol import NO_CHANGE, CachedGranules, Grant, Prefix, ReplicaState, ReserveRequest
from deployments.routing.admission import Admission
from deployments.routing.ledger import Ledger
from deployments.routing.policy import Size, blocks_left, grant_blocks, pick, score
from deployments.routing.prefixes import Match
from tests.unit.routing.worlds import EPOCH, granted, ledger, state, wish

PREFIX = Prefix(64, (1, 2))
USED = CachedGranules(used=(1, 2))
IDLE = CachedGranules(idle=(1, 2))


def roomy(replica: str, sequence: int = 1, held: int = 0, **changes: object) -> ReplicaState:
    """A report of a replica of 100 blocks of 16 tokens, `held` of which one request holds."""
    holds = ((f"other-{replica}", held),) if held else ()
    report = state(replica, sequence, capacity_blocks=100, max_context=1600, held=holds)
    return replace(report, **changes)  # type: ignore[arg-type]  # fields by name


def asks(key: str = "q", **changes: object) -> ReserveRequest:
    """A request of 160 tokens, 10 blocks, the first 8 of which are the prefix."""
    return wish(key, prompt=144, output=16, prefix=PREFIX, **changes)


def charged(of: Ledger, replica: str = "a") -> int:
    (seen,) = [view for view in of.view(0.0).replicas if view.replica_id == replica]
    return seen.charged_blocks


def admission() -> Admission:
    """The replica's side of `roomy("a")`."""
    built = Admission(replica_id="a", pool="default", epoch=1, block_size=16, capacity_blocks=100, max_context=1600)
    built.acknowledge(0, EPOCH)
    return built


def test_used_blocks_are_not_granted_and_idle_ones_are() -> None:
    used = granted(ledger(roomy("a", held=10, granules=USED)).reserve(asks(), 0.0))
    assert (used.blocks, used.shared_blocks) == (2, 8)
    idle = granted(ledger(roomy("a", granules=IDLE)).reserve(asks(), 0.0))
    assert (idle.blocks, idle.shared_blocks) == (10, 0)
    partly = granted(ledger(roomy("a", granules=CachedGranules(used=(1,), idle=(2,)))).reserve(asks(), 0.0))
    assert (partly.blocks, partly.shared_blocks) == (6, 4)


def test_a_request_that_only_fits_by_sharing_is_served() -> None:
    full = ledger(roomy("a", held=97, granules=USED))
    assert granted(full.reserve(asks(), 0.0)).blocks == 2
    assert not isinstance(full.reserve(asks("second"), 0.0), Grant)


@pytest.mark.parametrize(
    ("ahead", "granules", "chosen"),
    [
        (8, IDLE, {"a", "b"}),  # 128 tokens are cached, and the other has as many more room
        (7, IDLE, {"a"}),
        (9, IDLE, {"b"}),
        (15, USED, {"a"}),  # used: they count as room, too
        (17, USED, {"b"}),
    ],
)
def test_a_prefix_draws_as_far_as_its_length(ahead: int, granules: CachedGranules, chosen: set[str]) -> None:
    found = set()
    for rolls in range(12):
        world = ledger(roomy("a", held=20 + ahead, granules=granules), roomy("b", held=20))
        world._choice._rng.seed(rolls)
        found.add(granted(world.reserve(asks(), 0.0)).replica_id)
        world.check_integrity()
    assert found == chosen


def test_a_hot_prefix_spreads() -> None:
    """The bound of policy.py: u + c = 256 tokens; each request takes 32 of its own and has 16 of prompt to compute."""
    world = ledger(roomy("a", held=10, granules=USED), roomy("b", held=10))
    to = [granted(world.reserve(asks(f"q{k}"), 0.0)).replica_id for k in range(12)]
    assert to[:6] == ["a"] * 6
    assert to[6] == "b"


def test_another_pool_salt_or_granule_size_is_no_match() -> None:
    states = [roomy("a", held=5, granules=USED), roomy("b", pool="other")]
    world = ledger(*states, pools=("default", "other"))
    assert granted(world.reserve(asks("x", pool="other"), 0.0)).shared_blocks == 0
    assert granted(world.reserve(asks("y", pool="default"), 0.0)).shared_blocks == 8
    stranger = asks("z", pool="default")
    stranger = replace(stranger, prefix=Prefix(64, (11, 12)))
    assert granted(world.reserve(stranger, 0.0)).shared_blocks == 0


def test_a_draining_or_lost_replica_is_not_chosen_for_its_prefix() -> None:
    for change in ({"draining": True}, {"ledger_epoch": 0}):
        world = ledger(roomy("a", granules=USED, **change), roomy("b", held=50), expected_replicas=1)
        assert granted(world.reserve(asks(), 0.0)).replica_id == "b"
    world = ledger(roomy("a", granules=USED), roomy("b", held=50))
    world.replica_gone("a", 1)
    assert granted(world.reserve(asks(), 0.0)).replica_id == "b"


def test_a_new_life_of_a_replica_has_an_empty_cache() -> None:
    world = ledger(roomy("a", granules=USED))
    world.report(roomy("a", epoch=2), 0.0)
    assert granted(world.reserve(asks(), 0.0)).shared_blocks == 0
    world.check_integrity()


def test_a_late_report_does_not_bring_back_what_is_gone() -> None:
    world = ledger(roomy("a", granules=USED))
    world.report(roomy("a", 3, granules=CachedGranules(gone=(2,))), 0.0)
    world.report(roomy("a", 2, granules=CachedGranules(used=(2,))), 0.0)
    assert granted(world.reserve(asks(), 0.0)).shared_blocks == 4


def test_a_promise_is_charged_in_full_once_nobody_uses_what_it_was_to_share() -> None:
    world = ledger(roomy("a", held=10, granules=USED))
    granted(world.reserve(asks(), 0.0))
    assert charged(world) == 12
    world.report(roomy("a", 2, granules=IDLE), 0.0)  # the other request has ended
    assert charged(world) == 10
    world.report(roomy("a", 3, granules=USED), 0.0)  # and yet another one uses it
    assert charged(world) == 2
    world.check_integrity()


def test_a_request_taken_up_is_charged_in_full_until_it_shares_indeed() -> None:
    own = admission()
    world = ledger(roomy("a", held=10, granules=USED))
    grant = granted(world.reserve(asks(), 0.0))
    assert own.take_up(grant, 0.0) is None
    assert own.free_blocks == 90
    others = (("other-a", 10),)
    waits = replace(own.report(), sequence=2, held=(*others, *own.report().held))
    world.report(waits, 0.0)
    assert charged(world) == 20
    own.hold(grant.grant_id, 9)
    own.share(8)
    assert own.free_blocks == 98
    runs = replace(own.report(), sequence=3, held=(*others, *own.report().held))
    world.report(runs, 0.0)
    assert charged(world) == 12
    world.check_integrity()
    assert granted(world.reserve(wish("q2"), 0.0)).blocks == 2


def test_a_new_ledger_counts_what_is_shared_once() -> None:
    world = ledger(roomy("a", held=10, shared_blocks=4))
    assert charged(world) == 6
    (seen,) = world.view(0.0).replicas
    assert seen.held_blocks == 6


def test_a_report_is_due_when_sharing_or_the_cache_changes() -> None:
    own = admission()
    own.report()
    for change, due in [
        (lambda: own.share(0), False),
        (lambda: own.share(4), True),
        (lambda: own.note_granules(NO_CHANGE), False),
        (lambda: own.note_granules(USED), True),
        (own.lost_touch, True),
    ]:
        own.changed = False
        change()
        assert own.changed is due


def test_an_old_ledgers_acknowledgement_is_not_the_new_ones() -> None:
    own = admission()
    own.acknowledge(own.report().sequence, EPOCH)
    own.note_granules(USED)
    told = own.report()
    own.acknowledge(told.sequence, EPOCH - 1)
    assert own.report().granules.used == (1, 2)
    own.acknowledge(told.sequence, EPOCH)
    assert own.report().granules == NO_CHANGE
    own.acknowledge(told.sequence, EPOCH + 1)
    assert own.report().granules == CachedGranules(whole=True, used=(1, 2))


def test_the_policy_weighs_room_and_prefill_alike() -> None:
    size = Size(prompt_tokens=144, max_tokens=16, grant_tokens=160)
    (account,) = ledger(roomy("a", held=92))._fleet
    used, idle = Match(128, 128, 2), Match(0, 128)
    assert [grant_blocks(account, size, m) for m in (used, idle)] == [2, 10]
    assert [blocks_left(account, size, m) >= 0 for m in (used, idle)] == [True, False]
    assert [score(account, size, m) for m in (used, idle)] == [6 * 16 + 128, -2 * 16 + 128]
    dice = random.Random(0)
    assert pick([account], size, dice, lambda _: idle) is None
    assert pick([account], size, dice, lambda _: used) is account
