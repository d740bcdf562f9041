"""Hypothesis drives ledger and replicas with arrivals, cancellations, late messages, deaths and restarts.

The replicas run the real `Admission`. The observer never asks the ledger what it promised: it counts what the replicas
took up, and the grants still on their way that a replica would take up.

What is asked of the order in which requests are served is in `test_waiting_machine.py`; here it is that a large request
is passed by others no more than it must, and that everyone is served who can wait.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from deployments.protocol import Grant, IngressNotice, Refusal, ReplicaState, ReserveRequest
from deployments.routing.admission import Admission
from deployments.routing.ledger import Ledger, Queued
from deployments.routing.refusals import LedgerConfig
from deployments.routing.turns import Outcome

BLOCK = 16
CAPACITIES = (8, 20)  # blocks of replica 0 and 1
MOST_REQUESTS = (None, 3)  # at once
QUEUE_LIMIT = 6
TICK_S = 0.05
HEARTBEAT_S = 1.0
LATEST_S = 1.5  # of a report on its way; the ledger promises to be safe up to silence_s - heartbeat = 2 s
INGRESSES = ("a", "b")
TENANTS = ("", "ann", "bob")


@dataclass
class Replica:
    admission: Admission
    running: dict[str, Grant] = field(default_factory=dict)
    reported_at: float = 0.0
    paused: bool = False


@dataclass
class Flight:
    """A report on its way."""

    state: ReplicaState
    sent_at: float
    replica: Replica


class LedgerMachine(RuleBasedStateMachine):
    @initialize(seed=st.integers(0, 2**32))
    def start(self, seed: int) -> None:
        self.now = 1_000_000.0
        self.rng = random.Random(seed)
        self.lives = 0
        self.asked = 0
        self.waiting: dict[str, float] = {}  # request id -> deadline, in order of arrival
        self.ended: dict[str, Outcome | str] = {}
        self.asked_ids: set[str] = set()
        self.travelling: dict[str, Grant] = {}  # granted, not yet at the replica
        self.flights: list[Flight] = []
        self.silent: set[str] = set()  # ingresses that send nothing
        self.heard_from: dict[str, float] = {}
        self.replicas = [self.new_replica(k) for k in range(len(CAPACITIES))]
        self.dead: list[Replica] = []
        self.new_ledger()

    # The world

    def new_ledger(self) -> None:
        self.lives += 1
        weights = (("ann", 3),)
        config = LedgerConfig("m", expected_replicas=len(CAPACITIES), queue_limit=QUEUE_LIMIT, tenant_weights=weights)
        self.ledger = Ledger(config, epoch=self.lives, now=self.now, rng=self.rng)
        self.sold_from = self.now

    def new_replica(self, index: int) -> Replica:
        self.lives += 1
        capacity = CAPACITIES[index]
        return Replica(
            Admission(
                replica_id=f"r{index}",
                pool="default",
                epoch=self.lives,
                block_size=BLOCK,
                capacity_blocks=capacity,
                max_context=capacity * BLOCK,
                max_requests=MOST_REQUESTS[index],
            )
        )

    def kept(self) -> dict[str, str]:
        """Request id -> the replica that is kept for it."""
        return {key: account.state.replica_id for key, (_, account) in self.ledger._turns._kept_for.items()}

    def admit(self) -> None:
        kept = self.kept()
        outcomes = self.ledger.admit(self.now)
        for request_id, replica_id in kept.items():
            if self.kept().get(request_id) == replica_id:
                others = [o for o in outcomes if isinstance(o, Grant) and o.replica_id == replica_id]
                assert not others, f"{replica_id} is kept for {request_id}, and was granted to {others}"
        self.settle(outcomes)
        self.nobody_is_passed_for_long()

    def nobody_is_passed_for_long(self) -> None:
        """Nothing was served past a request after as much as the longest request, unless no replica could be kept."""
        if self.ledger._warming or not self.ledger._turns._settled:
            return  # who had a replica kept may just have left: those who wait are looked at before others are served
        kept = self.ledger._turns._kept_for
        for waiter in self.ledger._queue.firsts():
            longest = self.ledger._fleet.longest_tokens(waiter.request.pool)
            if waiter.passed_tokens >= longest and waiter.request.request_id not in kept:
                open_to_it = self.ledger._fleet.best(waiter.size, waiter.request.pool, self.rng)
                assert not open_to_it, f"{waiter} is passed, and {open_to_it} could be kept for it"

    def settle(self, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            self.finish(outcome)

    def finish(self, outcome: Outcome) -> None:
        key = outcome.request_id
        assert key not in self.ended, f"{key} ended twice"
        self.ended[key] = outcome
        self.waiting.pop(key, None)
        if isinstance(outcome, Grant):
            self.travelling[outcome.grant_id] = outcome

    def replica_of(self, grant: Grant) -> Replica | None:
        for replica in self.replicas:
            if (replica.admission.replica_id, replica.admission.epoch) == (grant.replica_id, grant.replica_epoch):
                return replica
        return None

    def send_due_reports(self) -> None:
        for replica in self.replicas:
            if not replica.paused and self.now - replica.reported_at >= HEARTBEAT_S:
                self.send_report(replica)

    def send_report(self, replica: Replica) -> None:
        replica.reported_at = self.now
        self.flights.append(Flight(replica.admission.report(), self.now, replica))

    def deliver(self, flight: Flight, keep: bool = False) -> None:
        if not keep:
            self.flights.remove(flight)
        epoch = self.ledger.report(flight.state, self.now)
        self.admit()
        flight.replica.admission.acknowledge(flight.state.sequence, epoch)
        for grant_id, expires_at in self.ledger.revoked(flight.state.replica_id):
            flight.replica.admission.revoke(grant_id, expires_at)

    # What happens

    @rule(
        prompt=st.integers(1, 150),
        output=st.integers(1, 250),
        wait=st.sampled_from([0.0, 0.3, 5.0, 1e6]),
        ingress=st.sampled_from(INGRESSES),
        tenant=st.sampled_from(TENANTS),
        priority=st.integers(-1, 1),
        again=st.sampled_from([False, False, False, True]),
    )
    def reserve(
        self, prompt: int, output: int, wait: float, ingress: str, tenant: str, priority: int, again: bool = False
    ) -> None:
        if ingress in self.silent:
            return
        self.asked += 1
        key = f"q{self.asked}"
        self.asked_ids.add(key)
        self.heard_from[ingress] = self.now
        request = ReserveRequest(key, ingress, prompt, output, wait, tenant=tenant, priority=priority, resumes=again)
        kept = self.kept()
        tenants = {waiter.request.request_id: waiter.request.tenant for waiter in self.ledger._queue._waiters.values()}
        outcome = self.ledger.reserve(request, self.now)
        made_room = self.ledger.displaced()
        for displaced in made_room:
            assert isinstance(displaced, Refusal)
            assert displaced.kind == "queue_full"
            assert len(self.waiting) >= QUEUE_LIMIT
            assert tenants[displaced.request_id] != tenant, "a tenant made room for itself"
            assert not isinstance(outcome, Refusal) or outcome.kind != "queue_full", "one too many was refused"
            self.finish(displaced)
        if isinstance(outcome, Queued):
            assert again or made_room or len(self.waiting) < QUEUE_LIMIT
            self.waiting[key] = self.now + wait
            return
        if isinstance(outcome, Grant):
            assert outcome.replica_id not in kept.values(), "a newcomer was granted a replica that is kept for another"
        elif outcome.kind == "too_long":
            known = [r.capacity_blocks for r in self.ledger.view(self.now).replicas]
            assert prompt + output > max(known) * BLOCK, "refused although it fits an empty replica"
        elif outcome.kind == "queue_full":
            assert len(self.waiting) >= QUEUE_LIMIT
            assert not again
            assert (outcome.retry_after_s or 0) >= 1
        self.finish(outcome)

    @rule(large=st.integers(100, 319), count=st.integers(5, 30), output=st.integers(1, 60), reports=st.booleans())
    def small_ones_pass_a_large_one(self, large: int, count: int, output: int, reports: bool) -> None:
        """One request stays and one needs nearly all the room; small ones come, run and end around them."""
        ingress = INGRESSES[0]
        if ingress in self.silent:
            return
        self.reserve(40, 40, 5.0, ingress, "ann", 0)
        self.all_arrive()
        self.reserve(large, 1, 1e6, ingress, "ann", 0)
        for _ in range(count):
            self.reserve(1, output, 5.0, ingress, "bob", 0)
            self.nobody_is_passed_for_long()
            for replica, key in self.all_arrive():
                del replica.running[key]
                replica.admission.end(key, prompt_tokens=1, output_tokens=output)
            if reports:
                self.all_reports_arrive()

    def all_arrive(self) -> list[tuple[Replica, str]]:
        """All grants on their way; returns those that were taken up."""
        taken = []
        for grant in self.travelling.values():
            replica = self.replica_of(grant)
            if replica is not None and not replica.paused and replica.admission.take_up(grant, self.now) is None:
                replica.running[grant.grant_id] = grant
                taken.append((replica, grant.grant_id))
        self.travelling.clear()
        return taken

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel_waiting(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(list(self.waiting)))
        del self.waiting[key]
        self.ended[key] = "cancelled"
        self.ledger.cancel(key, self.now)
        self.admit()

    @precondition(lambda self: self.travelling)
    @rule(data=st.data(), how=st.sampled_from(["arrive", "arrive", "arrive", "cancel", "give back", "vanish"]))
    def grant_travels(self, data: st.DataObject, how: str) -> None:
        grant = self.travelling[data.draw(st.sampled_from(list(self.travelling)))]
        replica = self.replica_of(grant)
        if how == "arrive" and replica is not None:
            if replica.paused:
                return
            del self.travelling[grant.grant_id]
            if replica.admission.take_up(grant, self.now) is None:
                replica.running[grant.grant_id] = grant
            else:
                self.ledger.release(grant.grant_id, self.now)
            assert replica.admission.take_up(grant, self.now) is not None, "a grant was taken up twice"
            return
        del self.travelling[grant.grant_id]
        if how == "cancel":
            self.ledger.cancel(grant.request_id, self.now)
        elif how == "give back":
            self.ledger.release(grant.grant_id, self.now)
            self.ledger.release(grant.grant_id, self.now)
        self.admit()

    @precondition(lambda self: self.travelling)
    @rule(data=st.data())
    def client_leaves_while_the_grant_travels(self, data: st.DataObject) -> None:
        """It may arrive all the same."""
        self.ledger.revoke(data.draw(st.sampled_from(list(self.travelling))))

    @rule(data=st.data(), kind=st.sampled_from(["grow", "end", "end"]))
    def request_moves(self, data: st.DataObject, kind: str) -> None:
        running = [(r, key) for r in self.replicas if not r.paused for key in r.running]
        if not running:
            return
        replica, key = data.draw(st.sampled_from(running))
        if kind == "grow":
            replica.admission.hold(key, data.draw(st.integers(0, replica.running[key].blocks)))
        else:
            del replica.running[key]
            replica.admission.end(key, prompt_tokens=1, output_tokens=data.draw(st.integers(0, 60)))

    @rule(index=st.integers(0, 1))
    def report(self, index: int) -> None:
        if not self.replicas[index].paused and self.replicas[index].admission.changed:
            self.send_report(self.replicas[index])

    @precondition(lambda self: self.flights)
    @rule(data=st.data(), keep=st.booleans())
    def report_arrives(self, data: st.DataObject, keep: bool) -> None:
        self.deliver(data.draw(st.sampled_from(self.flights)), keep)

    @rule()
    def all_reports_arrive(self) -> None:
        for replica in self.replicas:
            if not replica.paused:
                self.send_report(replica)
        for flight in list(self.flights):
            self.deliver(flight)

    @rule(index=st.integers(0, 1), told=st.booleans())
    def replica_restarts(self, index: int, told: bool) -> None:
        old = self.replicas[index]
        self.replicas[index] = self.new_replica(index)
        self.dead.append(old)
        if told:
            self.ledger.replica_gone(old.admission.replica_id, old.admission.epoch)

    @rule(index=st.integers(0, 1))
    def alive_but_called_gone(self, index: int) -> None:
        self.ledger.replica_gone(f"r{index}", self.replicas[index].admission.epoch)

    @rule(index=st.integers(0, 1))
    def pause_or_resume(self, index: int) -> None:
        self.replicas[index].paused = not self.replicas[index].paused

    @rule(index=st.integers(0, 1))
    def drain(self, index: int) -> None:
        self.replicas[index].admission.drain()

    @rule()
    def ledger_restarts(self) -> None:
        for key in list(self.waiting):
            self.ended[key] = "ledger lost"
        self.waiting.clear()
        self.new_ledger()

    @rule(ingress=st.sampled_from(INGRESSES))
    def ingress_silences_or_speaks(self, ingress: str) -> None:
        self.silent ^= {ingress}

    @rule(seconds=st.sampled_from([0.05, 0.3, 1.0, 4.0, 14.0]))
    def time_passes(self, seconds: float) -> None:
        until = self.now + seconds
        while self.now < until:
            self.now += TICK_S
            self.send_due_reports()
            for flight in [f for f in self.flights if self.now - f.sent_at >= LATEST_S]:
                self.deliver(flight)
            for ingress in INGRESSES:
                if ingress not in self.silent and self.now - self.heard_from.get(ingress, 0.0) >= 1.0:
                    self.ledger.notice(IngressNotice(ingress), self.now)
                    self.heard_from[ingress] = self.now
            self.settle(self.ledger.tick(self.now))
            overdue = [key for key, deadline in self.waiting.items() if deadline <= self.now]
            assert not overdue, f"{overdue} wait past their deadline"

    # What always holds

    @invariant()
    def nothing_is_sold_twice(self) -> None:
        for replica in self.replicas:
            own = replica.admission
            coming = [
                g
                for g in self.travelling.values()
                if (g.replica_id, g.replica_epoch) == (own.replica_id, own.epoch)
                and g.expires_at > self.now
                and g.ledger_epoch >= own.ledger_epoch
                and not own.draining
                and g.grant_id not in own._spent
            ]
            promised = sum(g.blocks for g in coming) + sum(g.blocks for g in replica.running.values())
            assert promised <= own.capacity_blocks, f"{own.replica_id}: {promised} of {own.capacity_blocks} blocks"
            requests = len(coming) + len(replica.running)
            assert own.max_requests is None or requests <= own.max_requests, f"{own.replica_id}: {requests} requests"

    @invariant()
    def everyone_is_somewhere_once(self) -> None:
        assert not self.waiting.keys() & self.ended.keys()
        assert self.waiting.keys() | self.ended.keys() == self.asked_ids
        for outcome in self.ended.values():
            assert isinstance(outcome, (Grant, Refusal, str))

    @invariant()
    def ledger_is_sound(self) -> None:
        self.ledger.check_integrity()
        assert self.ledger.view(self.now).waiting == len(self.waiting)

    def serve_all_who_can_wait(self) -> None:
        """Let everything end again and again: whoever waits is served, and nobody new is needed for that."""
        self.silent.clear()
        self.flights.clear()
        self.replicas = [self.new_replica(k) for k in range(len(CAPACITIES))]
        patient = {key for key, deadline in self.waiting.items() if deadline > self.now + 1000}
        for _ in range(len(patient) + 2):
            self.end_all()
            self.time_passes(14.0)
        assert not self.waiting.keys() & patient, f"{self.waiting} wait although everything has ended"
        for key in patient:
            end = self.ended[key]
            lost = isinstance(end, Refusal) and end.kind in (
                "no_replica",
                "too_long",
            )  # what its replica's loss made of it
            assert isinstance(end, Grant) or lost, f"{key}: {end}"

    def end_all(self) -> None:
        """Grants that travel are forgotten; what runs, ends."""
        self.travelling.clear()
        for replica in self.replicas:
            replica.paused = False
            for key in list(replica.running):
                del replica.running[key]
                replica.admission.end(key, prompt_tokens=1, output_tokens=1)

    def teardown(self) -> None:
        """When everything ends, everyone is served and everything is free again."""
        if not hasattr(self, "ledger"):
            return
        self.serve_all_who_can_wait()
        for key in list(self.waiting):
            self.ledger.cancel(key, self.now)
        self.waiting.clear()
        self.flights.clear()
        self.end_all()
        self.time_passes(14.0)
        for seen in self.ledger.view(self.now).replicas:
            assert seen.charged_blocks == 0, f"{seen.charged_blocks} blocks of {seen.replica_id} leaked"
            assert seen.promises == 0
        self.ledger.check_integrity()


LedgerMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestLedgerMachine = LedgerMachine.TestCase
