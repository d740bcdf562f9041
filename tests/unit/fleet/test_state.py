"""What the page is told: every state, every block once, ages, and what is not known yet."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from deployments.fleet.state import Kv, ModelCard, Sight, fleet_state
from deployments.metrics.board import Observation
from tests.unit.fleet.scenes import GB, ONE, TWELVE, UNEQUAL, Rep, observation, plan_on


def card(seen: Observation | None, *, answers: bool = True, seen_at: float = 100.0, now: float = 100.0) -> ModelCard:
    (model,) = fleet_state([Sight("m", answers, seen, seen_at)], now).models
    return model


def kv(rep: Rep) -> Kv:
    return card(observation(rep)).replicas[0].kv


@pytest.mark.parametrize(
    ("rep", "status"),
    [
        (Rep("r", None), "serving"),
        (Rep("r", None, sellable=False), "starting"),
        (Rep("r", None, draining=True), "draining"),
        (Rep("r", None, alive=False), "lost"),
        (Rep("r", None, alive=False, draining=True), "lost"),
    ],
)
def test_a_replicas_state_by_its_ledger(rep: Rep, status: str) -> None:
    model = card(observation(rep))
    assert model.replicas[0].status == status
    assert model.pools[0].serving == (status == "serving")
    assert model.missing_replicas == (status in ("draining", "lost"))


def test_blocks_add_up_to_the_capacity() -> None:
    assert kv(Rep("r", None, held=220, promised=90, cached=130)) == Kv(16, 1000, 220, 90, 130, 560, 690)


@pytest.mark.parametrize("held", [0, 700, 1000, 1100])
@pytest.mark.parametrize("promised", [0, 400, 1000])
@pytest.mark.parametrize("cached", [0, 500])
def test_blocks_add_up_whatever_the_reports_say(held: int, promised: int, cached: int) -> None:
    found = kv(Rep("r", None, held=held, promised=promised, cached=cached))
    parts = (found.held_blocks, found.promised_blocks, found.cached_blocks, found.empty_blocks)
    assert sum(parts) == found.capacity_blocks
    assert min(parts) >= 0
    assert found.held_blocks == min(1000, held)
    assert found.headroom_blocks == 1000 - held - promised  # below 0 when requests outgrew their grants


def test_what_a_replica_has_not_told_is_not_made_up() -> None:
    replica = card(observation(Rep("r", None, held=3, told=False, rate=None))).replicas[0]
    assert (replica.running, replica.waiting, replica.preemptions) == (None, None, None)
    assert (replica.tokens_per_s, replica.plan) == (None, None)
    assert replica.kv.held_blocks == 3  # by the ledger


def test_a_ledger_that_is_gone_leaves_its_last_words_with_their_age() -> None:
    seen = observation(Rep("r", None, silent_s=0.5, held=7))
    up = card(seen, now=100.4)
    gone = card(seen, answers=False, now=112.3)
    assert (up.ledger, up.age_s, up.replicas[0].silent_s) == ("up", 0.4, 0.5)
    assert (gone.ledger, gone.age_s, gone.replicas[0].silent_s) == ("gone", 12.3, 12.8)
    assert gone.replicas[0].kv == up.replicas[0].kv


def test_a_ledger_that_never_answered() -> None:
    model = card(None, answers=False)
    assert (model.ledger, model.age_s, model.replicas) == ("unknown", None, ())


def test_pools_have_those_who_wait_for_them_alone() -> None:
    (model,) = fleet_state([Sight("m", True, TWELVE["org/mixed-model"], 0.0)], 0.0).models
    assert [(pool.name, pool.replicas, pool.serving, pool.waiting) for pool in model.pools] == [
        ("large", 6, 4, 0),  # one drains, one starts
        ("small", 6, 5, 2),  # one is lost
    ]
    assert (model.waiting, model.missing_replicas) == (5, 4)
    assert [replica.pool for replica in model.replicas] == ["large"] * 6 + ["small"] * 6


def test_a_pool_without_replicas_is_shown_while_someone_waits_for_it() -> None:
    model = card(observation(waiting=(("gone", 2),), expected=1))
    assert [(pool.name, pool.replicas, pool.waiting) for pool in model.pools] == [("gone", 0, 2)]


def test_bars_have_every_byte_of_every_device() -> None:
    (model,) = fleet_state([Sight("m", True, UNEQUAL["llama-70b"], 0.0)], 0.0).models
    plan = model.replicas[0].plan
    assert plan is not None
    assert [(device.name, device.layers) for device in plan.devices][:2] == [
        ("80 GB card", (0, 7)),
        ("48 GB card", (8, 15)),
    ]
    for device, size in zip(plan.devices, (80, 48, 24, 16), strict=True):
        assert sum(part.bytes for part in device.parts) == device.memory_bytes == size * GB
        assert device.predicted_bytes == device.budget_bytes
        assert device.measured_bytes == device.budget_bytes * 104 // 100


def test_a_part_has_one_colour_everywhere_and_its_own() -> None:
    gpu, cpu = observation(Rep("a", plan_on(24))), observation(Rep("b", plan_on(8, cuda=False)))
    state = fleet_state([Sight("x", True, cpu, 0.0), Sight("y", True, gpu, 0.0)], 0.0)
    plans = [model.replicas[0].plan for model in state.models]
    pairs = {(p.name, p.colour) for plan in plans if plan for device in plan.devices for p in device.parts}
    assert len(pairs) == len({name for name, _ in pairs})
    coloured = [colour for _, colour in pairs if colour]
    assert len(coloured) == len(set(coloured))
    assert {name for name, colour in pairs if colour is None} == {"free", "outside the budget"}


def test_a_part_of_a_later_version_gets_a_colour_too() -> None:
    seen = ONE["llama-8b"]
    told = seen.outlines["6m2kq0ab"]
    parts = (replace(told.devices[0].parts[0], name="something new"), *told.devices[0].parts[1:])
    newer = replace(seen, outlines={"6m2kq0ab": replace(told, devices=(replace(told.devices[0], parts=parts),))})
    plan = card(newer).replicas[0].plan
    assert plan is not None
    assert str(plan.devices[0].parts[0].colour).startswith("#")


def test_it_is_plain_json() -> None:
    state = fleet_state([Sight(name, True, seen, 0.0) for name, seen in (ONE | TWELVE).items()], 0.5)
    document = json.loads(json.dumps(asdict(state)))
    assert document["schema"] == "headroom.fleet/1"
    assert document["models"][0]["replicas"][0]["kv"]["headroom_blocks"] == 690
