"""The waiting queue against plain sorting of all who wait, and against what fair queueing promises."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from deployments.routing.fairness import FairShares
from deployments.routing.policy import Size
from deployments.routing.waiting import Place, Waiter, WaitingQueue
from tests.unit.routing.worlds import wish

WEIGHTS = {"a": 1, "b": 3, "c": 1, "d": 7}
LARGEST = 90


class WaitingMachine(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        self.shares = FairShares(WEIGHTS)
        self.queue = WaitingQueue(self.shares)
        self.waiting: dict[str, Waiter] = {}
        self.joined = 0
        self.since: dict[tuple[str, str], dict[str, int]] = {}
        """Pair of tenants that both wait -> tokens that each was granted since both do."""

    def place(self, waiter: Waiter) -> Place:
        request = waiter.request
        return not request.resumes, self.shares.tag(request.tenant), request.priority, waiter.arrival

    def note_who_waits(self) -> None:
        names = sorted({waiter.request.tenant for waiter in self.waiting.values()})
        self.since = {pair: self.since.get(pair, dict.fromkeys(pair, 0)) for pair in combinations(names, 2)}

    @rule(
        count=st.integers(1, 5),
        tenant=st.sampled_from(sorted(WEIGHTS)),
        tokens=st.integers(2, LARGEST),
        priority=st.integers(-1, 1),
        pool=st.sampled_from([None, None, "small"]),
        resumes=st.sampled_from([False, False, True]),
    )
    def join(self, count: int, tenant: str, tokens: int, priority: int, pool: str | None, resumes: bool) -> None:
        for _ in range(count):
            self.joined += 1
            key = f"q{self.joined}"
            request = wish(key, tenant=tenant, priority=priority, pool=pool, resumes=resumes)
            waiter = Waiter(request, Size(1, tokens - 1, tokens), 0, 1e9)
            self.waiting[key] = waiter
            self.queue.join(waiter)
            lines = [w for w in self.waiting.values() if w.kind == waiter.kind]
            assert self.queue.is_first(waiter) == (waiter is min(lines, key=self.place))
        self.note_who_waits()

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def leave_unserved(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.waiting)))
        assert self.queue.leave(key) is self.waiting.pop(key)
        self.note_who_waits()

    @precondition(lambda self: self.waiting)
    @rule(times=st.integers(1, 6))
    def serve_the_first(self, times: int) -> None:
        for _ in range(min(times, len(self.waiting))):
            waiter = self.queue.firsts()[0]
            assert waiter is min(self.waiting.values(), key=self.place)
            self.serve(waiter)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def serve_one_that_passes_others(self, data: st.DataObject) -> None:
        """There was no room for those before it. Fairness in the short run is given up for that."""
        self.serve(data.draw(st.sampled_from(self.queue.firsts())))
        self.since.clear()
        self.note_who_waits()

    def serve(self, waiter: Waiter) -> None:
        tenant, tokens = waiter.request.tenant, waiter.size.grant_tokens
        self.queue.leave(waiter.request.request_id, granted_tokens=tokens)
        del self.waiting[waiter.request.request_id]
        for pair, served in self.since.items():
            if tenant in pair and not waiter.request.resumes:  # which was paid for when it was granted before
                served[tenant] += tokens
        self.note_who_waits()

    @invariant()
    def the_first_of_each_line_is_the_first_of_all_that_are_alike(self) -> None:
        if not hasattr(self, "queue"):
            return
        kinds = {waiter.kind for waiter in self.waiting.values()}
        firsts = [min((w for w in self.waiting.values() if w.kind == kind), key=self.place) for kind in kinds]
        assert self.queue.firsts() == sorted(firsts, key=self.place)
        self.queue.check_integrity()

    @invariant()
    def the_sums_are_those_of_all_who_wait(self) -> None:
        if not hasattr(self, "queue"):
            return
        for pool in (None, "small"):
            mine = [w.size for w in self.waiting.values() if w.request.pool == pool]
            sums = [each for each in self.queue.sums() if each.pool == pool]
            assert sum(each.tokens for each in sums) == sum(size.grant_tokens for size in mine)
            longest = max((size.prompt_tokens + size.max_tokens for size in mine), default=0)
            assert longest <= max((each.longest_tokens for each in sums), default=0) < 2 * max(longest, 1)

    @invariant()
    def tenants_that_wait_get_their_shares(self) -> None:
        """Goyal, Vin and Cheng's bound, one request of each tenant more for where in its request each of them began."""
        if not hasattr(self, "since"):
            return
        for (one, other), served in self.since.items():
            gap = Fraction(served[one], WEIGHTS[one]) - Fraction(served[other], WEIGHTS[other])
            bound = Fraction(2 * LARGEST, WEIGHTS[one]) + Fraction(2 * LARGEST, WEIGHTS[other])
            assert abs(gap) <= bound, f"{one} and {other}: {served}"


WaitingMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
TestWaitingMachine = WaitingMachine.TestCase
