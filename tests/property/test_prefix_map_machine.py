"""What the ledger knows of caches, after reports that were lost, late, doubled, and ledgers that were replaced.

The replicas run the real `Admission` with granules that Hypothesis invents; the ledger is the real one. At each report
that it accepts, what it knows of the replica must be what a fresh map would hold that is told everything.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from deployments.protocol import CachedGranules, Prefix, ReplicaState
from deployments.routing.admission import Admission
from deployments.routing.ledger import Ledger
from deployments.routing.prefixes import PrefixMap
from deployments.routing.refusals import LedgerConfig

CHAINS = [Prefix(64, (1, 2, 3, 4)), Prefix(64, (1, 2, 5)), Prefix(64, (6, 7))]
"""Three prompts; two of them begin alike."""


@dataclass
class Replica:
    admission: Admission
    used: list[int] = field(default_factory=lambda: [0] * len(CHAINS))
    """Granules of each chain that requests use: closed, as an engine's are."""
    cached: list[int] = field(default_factory=lambda: [0] * len(CHAINS))
    told: dict[int, bool] = field(default_factory=dict)
    """What the engine has said so far."""

    def truth(self) -> dict[int, bool]:
        """Granule -> whether it is used."""
        cached = {g: False for chain, n in zip(CHAINS, self.cached, strict=True) for g in chain.hashes[:n]}
        return cached | {g: True for chain, n in zip(CHAINS, self.used, strict=True) for g in chain.hashes[:n]}

    def tell(self) -> None:
        """The engine's next step report."""
        now, before = self.truth(), self.told
        changed = {g: state for g, state in now.items() if before.get(g) is not state}
        self.admission.note_granules(
            CachedGranules(
                used=tuple(g for g, used in changed.items() if used),
                idle=tuple(g for g, used in changed.items() if not used),
                gone=tuple(before.keys() - now.keys()),
            )
        )
        self.told = now


@dataclass
class Flight:
    """A report on its way, and what was true when it was made."""

    replica: Replica
    state: ReplicaState
    truth: dict[int, bool]


class PrefixMachine(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        self.now, self.lives = 1_000_000.0, 0
        self.flights: list[Flight] = []
        self.new_ledger()
        self.replicas = [self.new_replica(k) for k in range(2)]

    def new_ledger(self) -> None:
        self.lives += 1
        self.ledger = Ledger(LedgerConfig("m"), epoch=self.lives, now=self.now, rng=random.Random(0))
        self.heard: dict[str, Flight] = {}
        """The newest report of each replica that this ledger had."""
        self.complete: set[tuple[str, int]] = set()
        """(replica, epoch) of which it has had the whole."""

    def new_replica(self, index: int) -> Replica:
        self.lives += 1
        admission = Admission(
            replica_id=f"r{index}",
            pool="default",
            epoch=self.lives,
            block_size=16,
            capacity_blocks=100,
            max_context=1600,
        )
        return Replica(admission)

    @rule(index=st.integers(0, 1), chain=st.integers(0, 2), used=st.integers(0, 4), idle=st.integers(0, 4))
    def cache_changes(self, index: int, chain: int, used: int, idle: int) -> None:
        replica = self.replicas[index]
        length = len(CHAINS[chain].hashes)
        replica.used[chain] = min(used, length)
        replica.cached[chain] = min(used + idle, length)
        replica.tell()

    @rule(index=st.integers(0, 1))
    def report(self, index: int) -> None:
        replica = self.replicas[index]
        self.flights.append(Flight(replica, replica.admission.report(), replica.truth()))

    @precondition(lambda self: self.flights)
    @rule(data=st.data(), end=st.sampled_from(["arrives", "arrives", "arrives twice", "lost", "answer lost"]))
    def flight_ends(self, data: st.DataObject, end: str) -> None:
        flight = data.draw(st.sampled_from(self.flights))
        if end != "arrives twice":
            self.flights.remove(flight)
        if end == "lost":
            return
        state = flight.state
        last = self.heard.get(state.replica_id)
        epoch = self.ledger.report(state, self.now)
        if last is None or (state.epoch, state.sequence) > (last.state.epoch, last.state.sequence):
            self.heard[state.replica_id] = flight
            if state.granules.whole:
                self.complete.add((state.replica_id, state.epoch))
        if end != "answer lost":
            flight.replica.admission.acknowledge(state.sequence, epoch)

    @rule()
    def ledger_restarts(self) -> None:
        self.new_ledger()

    @rule(index=st.integers(0, 1))
    def replica_restarts(self, index: int) -> None:
        self.replicas[index] = self.new_replica(index)

    @rule(index=st.integers(0, 1))
    def ledger_forgets(self, index: int) -> None:
        """It heard nothing for long; the sender finds out by the gap, and says so once it is heard again."""
        replica = self.replicas[index]
        self.flights = [f for f in self.flights if f.replica is not replica]
        others = [f for key, f in self.heard.items() if key != f"r{index}"]
        self.now += 60.0
        self.ledger.tick(self.now)
        self.heard.clear()
        self.complete.clear()
        for flight in others:
            self.flights = [f for f in self.flights if f.replica is not flight.replica]
        for each in self.replicas:
            each.admission.lost_touch()

    @invariant()
    def knows_what_it_was_told(self) -> None:
        if not hasattr(self, "ledger"):
            return
        self.ledger.check_integrity()
        known, fresh = self.ledger._books.prefixes, PrefixMap()
        for key, flight in self.heard.items():
            used = tuple(g for g, is_used in flight.truth.items() if is_used)
            idle = tuple(g for g, is_used in flight.truth.items() if not is_used)
            fresh.hear(key, CachedGranules(whole=True, used=used, idle=idle))
            for chain in CHAINS:
                mine, whole = known.match(chain, key), fresh.match(chain, key)
                if (key, flight.state.epoch) in self.complete:
                    assert mine == whole
                    assert (key in known.holders(chain, 9)) == (whole.cached_tokens > 0)
                for granule in chain.hashes:  # never more than there is, complete or not
                    assert granule in fresh.used(key) or granule not in known.used(key)
        for chain in CHAINS:
            assert set(known.holders(chain, 9)) <= self.heard.keys()

    def teardown(self) -> None:
        """Two reports that arrive are enough for a ledger to know everything."""
        if not hasattr(self, "ledger"):
            return
        self.flights.clear()
        for replica in self.replicas:
            for _ in range(2):
                state = replica.admission.report()
                replica.admission.acknowledge(state.sequence, self.ledger.report(state, self.now))
                self.heard[state.replica_id] = Flight(replica, state, replica.truth())
            self.complete.add((state.replica_id, state.epoch))
            assert not replica.admission.report().granules.gone
        self.knows_what_it_was_told()


PrefixMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
TestPrefixMachine = PrefixMachine.TestCase
