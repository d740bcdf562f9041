"""The index of replicas answers as a plain scan over all of them would, after whatever happened to them."""

from __future__ import annotations

import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from deployments.routing.account import ReplicaAccount
from deployments.routing.fleet import Fleet, shelf_of
from deployments.routing.policy import Size, blocks_left, fits_ever, pick
from tests.unit.routing.worlds import state

SHAPES = [("a", 16, 10), ("a", 16, 9), ("a", 16, 40), ("a", 32, 10), ("b", 16, 40), ("b", 8, 100)]
"""(pool, block size, blocks)."""
MOST_REQUESTS = 4
NAMES = [f"r{k}" for k in range(7)]


def ease(account: ReplicaAccount) -> int:
    return account.headroom_blocks * account.block_size - account.ahead_tokens


class FleetMachine(RuleBasedStateMachine):
    @initialize(seed=st.integers(0, 2**32))
    def start(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.fleet = Fleet()
        self.known: dict[str, ReplicaAccount] = {}
        self.sold: set[str] = set()
        self.kept: set[str] = set()

    @rule(name=st.sampled_from(NAMES), shape=st.sampled_from(SHAPES), short=st.booleans())
    def comes(self, name: str, shape: tuple[str, int, int], short: bool) -> None:
        pool, block, blocks = shape
        context = block * blocks // (2 if short else 1)
        self.goes(name)
        shape_of = {"pool": pool, "block_size": block, "capacity_blocks": blocks, "max_context": context}
        report = state(name, max_requests=MOST_REQUESTS, **shape_of)
        self.known[name] = ReplicaAccount(report, 0.0)
        self.fleet.add(self.known[name])
        self.fleet.place(self.known[name], sold=False)

    @rule(name=st.sampled_from(NAMES))
    def goes(self, name: str) -> None:
        assert self.fleet.remove(name) is self.known.pop(name, None)
        self.sold.discard(name)
        self.kept.discard(name)

    @rule(
        name=st.sampled_from(NAMES),
        charged=st.integers(0, 45),
        requests=st.sampled_from([0, 0, MOST_REQUESTS]),
        ahead=st.sampled_from([0, 0, 20, 200]),
        sold=st.booleans(),
        alive=st.booleans(),
    )
    def changes(self, name: str, charged: int, requests: int, ahead: int, sold: bool, alive: bool) -> None:
        if (account := self.known.get(name)) is not None:
            account.ahead_tokens = ahead
            account.charged_blocks, account.charged_requests, account.alive = charged, requests, alive
            self.fleet.place(account, sold=sold)
            self.sold = self.sold | {name} if sold else self.sold - {name}

    @rule(name=st.sampled_from(NAMES))
    def is_kept_or_given_back(self, name: str) -> None:
        if name in self.kept:
            self.fleet.give_back(self.known[name])
            self.kept.remove(name)
        elif name in self.sold:
            self.fleet.keep(self.known[name])
            self.kept.add(name)

    @rule(
        prompt=st.integers(1, 500),
        output=st.integers(1, 500),
        expected=st.integers(1, 200),
        pool=st.sampled_from([None, "a", "b", "c"]),
    )
    def best(self, prompt: int, output: int, expected: int, pool: str | None) -> None:
        size = Size(prompt, output, prompt + min(output, expected))
        everyone = [self.known[name] for name in self.sold - self.kept]
        ours = [each for each in everyone if pool is None or each.state.pool == pool]
        found = self.fleet.best(size, pool, self.rng)
        assert all(each in ours and fits_ever(each, size) for each in found)
        for each in ours:
            if fits_ever(each, size) and blocks_left(each, size) >= 0:
                alike = [one for one in found if blocks_left(one, size) >= 0 and shelf_of(one) == shelf_of(each)]
                assert any(ease(one) >= ease(each) for one in alike), f"{each.state.replica_id} is better"
        indexed = pick(found, size, self.rng)
        assert (indexed is None) == (pick(ours, size, self.rng) is None)
        assert indexed is None or indexed.charged_requests < MOST_REQUESTS

    @invariant()
    def sums_and_shelves_are_right(self) -> None:
        if hasattr(self, "fleet"):
            self.fleet.check_integrity()
            for pool in (None, "a", "b"):
                mine = [each for each in self.known.values() if pool is None or each.state.pool == pool]
                longest = max((each.longest_tokens for each in mine), default=0)
                assert self.fleet.longest_tokens(pool) == longest


FleetMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestFleetMachine = FleetMachine.TestCase
