"""Requests that share prefixes, on real block accounts: what the ledger promises is there when it is needed.

Ledger, admission and block manager are the real ones; reports arrive late and are lost. No request outgrows its grant
here, so no table may ever fail to grow: a shared block was charged to somebody, or it was evicted for nobody's need.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from deployments.engine.blocks import BlockManager
from deployments.granules import prefix_of
from deployments.protocol import Grant, ReplicaState, ReserveRequest
from deployments.routing.admission import Admission
from deployments.routing.ledger import Ledger
from deployments.routing.refusals import LedgerConfig

BLOCK, GRANULE = 2, 4
CAPACITY = 30
LATEST_S = 1.5
BEGINNINGS = [tuple(range(100, 116)), (*range(100, 108), *range(200, 208)), tuple(range(300, 312))]
"""Prompts begin with some of one of these; the first two begin alike."""


@dataclass
class Running:
    """A request that a replica has taken up."""

    grant: Grant
    ids: list[int]
    prompt: int
    most: int
    """Tokens of prompt and output; what was granted covers them."""
    open: bool = False
    computed: int = 0


@dataclass
class Replica:
    admission: Admission
    blocks: BlockManager = field(default_factory=lambda: BlockManager(CAPACITY, BLOCK, granule_tokens=GRANULE))
    running: dict[str, Running] = field(default_factory=dict)
    reported_at: float = 0.0

    def step_ends(self) -> None:
        """The engine's report of a step, as `Replica` takes it in."""
        for key, one in self.running.items():
            self.admission.hold(one.grant.grant_id, self.blocks.held(key))
        self.admission.share(self.blocks.shared_blocks)
        self.admission.note_granules(self.blocks.take_granule_news())


class SharingMachine(RuleBasedStateMachine):
    @initialize(seed=st.integers(0, 2**32), replicas=st.integers(1, 2))
    def start(self, seed: int, replicas: int) -> None:
        self.now, self.rng, self.lives, self.asked = 1_000_000.0, random.Random(seed), 0, 0
        self.replicas = [
            Replica(
                Admission(
                    replica_id=f"r{k}",
                    pool="default",
                    epoch=1,
                    block_size=BLOCK,
                    capacity_blocks=CAPACITY,
                    max_context=CAPACITY * BLOCK,
                )
            )
            for k in range(replicas)
        ]
        self.travelling: dict[str, tuple[Grant, list[int], int]] = {}
        self.flights: list[tuple[float, Replica, ReplicaState]] = []
        self.new_ledger()
        for _ in range(2):
            self.all_reports_arrive()

    def new_ledger(self) -> None:
        self.lives += 1
        config = LedgerConfig("m", expected_replicas=len(self.replicas), queue_limit=0)
        self.ledger = Ledger(config, epoch=self.lives, now=self.now, rng=self.rng)

    def deliver(self, replica: Replica, state: ReplicaState) -> None:
        replica.admission.acknowledge(state.sequence, self.ledger.report(state, self.now))

    def send(self, replica: Replica) -> None:
        replica.reported_at = self.now
        self.flights.append((self.now, replica, replica.admission.report()))

    @rule(which=st.integers(0, 2), granules=st.integers(0, 4), tail=st.integers(1, 6), output=st.integers(1, 8))
    def reserve(self, which: int, granules: int, tail: int, output: int) -> None:
        own = 10 * self.asked + 1000
        self.ask([*BEGINNINGS[which][: granules * GRANULE], *range(own, own + tail)], output)

    def ask(self, ids: list[int], output: int) -> None:
        self.asked += 1
        key = f"q{self.asked}"
        request = ReserveRequest(key, "in", len(ids), output, 0.0, prefix=prefix_of(ids, "", GRANULE))
        grant = self.ledger.reserve(request, self.now)
        if isinstance(grant, Grant):
            assert grant.shared_blocks * BLOCK < len(ids)
            assert grant.blocks >= 1
            self.travelling[key] = (grant, ids, len(ids) + output)

    @rule(which=st.integers(0, 2), granules=st.integers(2, 4), output=st.integers(1, 8))
    def serve(self, which: int, granules: int, output: int) -> None:
        """A request is granted, computed and reported at once, so that others find its prefix in use."""
        self.run_at_once([*BEGINNINGS[which][: granules * GRANULE], self.asked + 1000], output)

    @rule()
    def fill(self) -> None:
        """Strangers take all room that the ledger thinks there is, and whatever idle cached blocks it takes."""
        for seen in self.ledger.view(self.now).replicas:
            tokens = (seen.capacity_blocks - seen.charged_blocks) * BLOCK
            if tokens > 1:
                self.run_at_once([1000 * self.asked + k for k in range(10_000, 10_000 + tokens - 1)], 1)

    def run_at_once(self, ids: list[int], output: int) -> None:
        before = set(self.travelling)
        self.ask(ids, output)
        for key in self.travelling.keys() - before:
            grant, ids, most = self.travelling.pop(key)
            (replica,) = [r for r in self.replicas if r.admission.replica_id == grant.replica_id]
            if replica.admission.take_up(grant, self.now) is None:
                replica.running[key] = Running(grant, ids, len(ids), most, open=True, computed=len(ids))
                replica.blocks.open(key, ids, "")
                replica.blocks.grow(key, len(ids))
                replica.blocks.commit(key, ids, len(ids))
                replica.step_ends()
        self.all_reports_arrive()

    @precondition(lambda self: self.travelling)
    @rule(data=st.data(), arrives=st.sampled_from([True, True, True, False]))
    def grant_travels(self, data: st.DataObject, arrives: bool) -> None:
        key = data.draw(st.sampled_from(list(self.travelling)))
        grant, ids, most = self.travelling.pop(key)
        (replica,) = [r for r in self.replicas if r.admission.replica_id == grant.replica_id]
        if arrives and replica.admission.take_up(grant, self.now) is None:
            assert most <= (grant.blocks + grant.shared_blocks) * BLOCK
            replica.running[key] = Running(grant, ids, len(ids), most)
        else:
            self.ledger.release(grant.grant_id, self.now)

    @rule(data=st.data(), share=st.floats(0, 1))
    def request_advances(self, data: st.DataObject, share: float) -> None:
        """Admitted, computed, or grown: never more than it was granted, so there is always room."""
        running = [(r, key) for r in self.replicas for key in r.running]
        if not running:
            return
        replica, key = data.draw(st.sampled_from(running))
        one = replica.running[key]
        if not one.open:
            replica.blocks.open(key, one.ids, "")
            one.open = True
        elif one.computed < one.prompt:
            one.computed = max(one.computed + 1, int(share * one.prompt))
        elif len(one.ids) < one.most:
            one.ids += [self.rng.randrange(2) for _ in range(max(1, int(share * (one.most - len(one.ids)))))]
            one.computed = len(one.ids) - 1
        replica.blocks.grow(key, len(one.ids))
        replica.blocks.commit(key, one.ids, min(one.computed, len(one.ids)))
        replica.step_ends()

    @rule(data=st.data(), told=st.booleans())
    def request_ends(self, data: st.DataObject, told: bool) -> None:
        running = [(r, key) for r in self.replicas for key in r.running]
        if not running:
            return
        replica, key = data.draw(st.sampled_from(running))
        one = replica.running.pop(key)
        if one.open:
            replica.blocks.close(key)
        replica.admission.end(one.grant.grant_id, prompt_tokens=one.prompt, output_tokens=1)
        replica.step_ends()
        if told:
            self.all_reports_arrive()

    @rule(index=st.integers(0, 1))
    def report(self, index: int) -> None:
        self.send(self.replicas[index % len(self.replicas)])

    @precondition(lambda self: self.flights)
    @rule(data=st.data(), lost=st.booleans())
    def report_arrives(self, data: st.DataObject, lost: bool) -> None:
        number = data.draw(st.integers(0, len(self.flights) - 1))
        _, replica, state = self.flights.pop(number)
        if not lost:
            self.deliver(replica, state)

    @rule()
    def all_reports_arrive(self) -> None:
        for replica in self.replicas:
            self.send(replica)
        for _, replica, state in self.flights:
            self.deliver(replica, state)
        self.flights.clear()

    @rule()
    def ledger_restarts(self) -> None:
        self.new_ledger()

    @rule(seconds=st.sampled_from([0.3, 1.0, 6.0, 14.0]))
    def time_passes(self, seconds: float) -> None:
        until = self.now + seconds
        while self.now < until:
            self.now += 0.25
            for replica in self.replicas:
                if self.now - replica.reported_at >= 1.0:
                    self.send(replica)
            for flight in [f for f in self.flights if self.now - f[0] >= LATEST_S]:
                self.flights.remove(flight)
                self.deliver(flight[1], flight[2])
            self.ledger.tick(self.now)

    @invariant()
    def accounts_are_sound(self) -> None:
        if not hasattr(self, "ledger"):
            return
        self.ledger.check_integrity()
        for replica in self.replicas:
            replica.blocks.check_integrity()
            report = replica.admission.report()
            held = sum(blocks for _, blocks in report.held) - report.shared_blocks
            assert held >= replica.blocks.held_blocks, f"{held} blocks reported, {replica.blocks.held_blocks} held"

    def teardown(self) -> None:
        """Every request still here can run to the end of what it was granted, all of them at once."""
        if not hasattr(self, "ledger"):
            return
        for key in list(self.travelling):
            grant, ids, most = self.travelling.pop(key)
            (replica,) = [r for r in self.replicas if r.admission.replica_id == grant.replica_id]
            if replica.admission.take_up(grant, self.now) is None:
                replica.running[key] = Running(grant, ids, len(ids), most)
        for replica in self.replicas:
            for key, one in replica.running.items():
                if not one.open:
                    replica.blocks.open(key, one.ids, "")
                replica.blocks.grow(key, one.most)
            for key in replica.running:
                replica.blocks.close(key)
            assert replica.blocks.shared_blocks == replica.blocks.held_blocks == 0


SharingMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
TestSharingMachine = SharingMachine.TestCase
