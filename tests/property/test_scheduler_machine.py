"""Scheduler and block manager against a toy engine whose KV cache remembers what was written where.

The toy's KV of a position is (salt, all ids up to it). It derives a position's KV from what its block table holds for
the position before, so one wrong block, or one shared too early, changes the tokens or trips an assertion.
"""

from __future__ import annotations

import random
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from deployments.engine.blocks import BlockManager
from deployments.engine.scheduler import Scheduler, StepItem, StepPlan

END = 0
Kv = tuple[str, tuple[int, ...]]
IN_PROGRESS: Kv = ("being written", ())


def next_token(ids: tuple[int, ...]) -> int:
    """A model: any id in 0..5 from all ids so far; END about once in eight."""
    draw = random.Random(",".join(map(str, ids))).randrange(8)
    return min(draw, 5)


def sequential(prompt: tuple[int, ...], max_tokens: int) -> list[int]:
    """What one request alone produces."""
    output: list[int] = []
    while len(output) < max_tokens and END not in output:
        output.append(next_token((*prompt, *output)))
    return output


class ToyEngine:
    """Executes steps: marks what it writes at launch, writes at completion, and checks what it reads at both."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.kv: dict[tuple[int, int], Kv] = {}

    def _place(self, item: StepItem, position: int) -> tuple[int, int]:
        return item.block_table[position // self.block_size], position % self.block_size

    def check_reads(self, item: StepItem, salt: str, known: tuple[int, ...]) -> None:
        for position in range(item.start):
            assert self.kv[self._place(item, position)] == (salt, known[: position + 1])

    def launch(self, item: StepItem) -> None:
        for position in range(item.start, item.start + len(item.ids)):
            self.kv[self._place(item, position)] = IN_PROGRESS

    def run(self, item: StepItem, salt: str) -> int:
        """Writes the item's KV; returns the token that follows its last id."""
        ids: tuple[int, ...] = ()
        if item.start:
            _, ids = self.kv[self._place(item, item.start - 1)]
        for offset, token in enumerate(item.ids):
            place = self._place(item, item.start + offset)
            assert self.kv[place] is IN_PROGRESS, "another step wrote here while this one was in flight"
            ids = (*ids, token)
            self.kv[place] = (salt, ids)
        return next_token(ids)


class Requests:
    """The engine loop's part: who asked for what, who ended and how."""

    def __init__(self, num_blocks: int, block_size: int, prefix_cache: bool, **limits: Any) -> None:
        self.blocks = BlockManager(num_blocks, block_size, prefix_cache=prefix_cache)
        self.scheduler = Scheduler(self.blocks, **limits)
        self.slots, self.max_batch_tokens = limits["slots"], limits["max_batch_tokens"]
        self.engine = ToyEngine(block_size)
        self.asked: dict[str, tuple[tuple[int, ...], int, str]] = {}
        self.outputs: dict[str, list[int]] = {}
        self.ended: dict[str, str] = {}
        self.in_flight: dict[int, StepPlan] = {}

    def live(self) -> list[str]:
        return [request_id for request_id in self.asked if request_id not in self.ended]

    def add(self, prompt: tuple[int, ...], max_tokens: int, salt: str) -> None:
        request_id = f"r{len(self.asked)}"
        self.scheduler.add(request_id, prompt, max_tokens=max_tokens, salt=salt)
        self.asked[request_id] = (prompt, max_tokens, salt)
        self.outputs[request_id] = []

    def end(self, request_id: str, how: str) -> None:
        assert request_id not in self.ended, "ended twice"
        self.ended[request_id] = how

    def known(self, request_id: str) -> tuple[int, ...]:
        return (*self.asked[request_id][0], *self.outputs[request_id])

    def launch(self, slot: int) -> bool:
        plan = self.scheduler.schedule(slot)
        if plan is None:
            return False
        self.in_flight[slot] = plan
        assert plan.slot == slot
        assert 0 < sum(len(item.ids) for item in plan.items) <= self.max_batch_tokens
        flying = [item.request_id for step in self.in_flight.values() for item in step.items]
        assert len(flying) == len(set(flying)), "a sequence is in two places at once"
        for item in plan.items:
            self.check_item(item)
        return True

    def check_item(self, item: StepItem) -> None:
        assert item.request_id not in self.ended
        known, end = self.known(item.request_id), item.start + len(item.ids)
        assert item.ids == known[item.start : end]
        assert item.samples == (end == len(known))
        assert len(item.block_table) == -(-end // self.engine.block_size)
        self.engine.check_reads(item, self.asked[item.request_id][2], known)
        self.engine.launch(item)

    def land(self, slot: int) -> None:
        plan = self.in_flight.pop(slot)
        tokens = {}
        for item in plan.items:
            salt = self.asked[item.request_id][2]
            self.engine.check_reads(item, salt, self.known(item.request_id))
            token = self.engine.run(item, salt)
            if item.samples and item.request_id not in self.ended:
                tokens[item.request_id] = token
        self.scheduler.complete(plan, tokens)
        for request_id, token in tokens.items():
            self.take_token(request_id, token)

    def take_token(self, request_id: str, token: int) -> None:
        self.outputs[request_id].append(token)
        assert self.scheduler.sequence(request_id).output_ids == self.outputs[request_id]
        prompt, max_tokens, _ = self.asked[request_id]
        if token == END or len(self.outputs[request_id]) == max_tokens:
            self.scheduler.finish(request_id)
            self.end(request_id, "finished")
            assert self.outputs[request_id] == sequential(prompt, max_tokens)

    def lose(self, slot: int) -> None:
        plan = self.in_flight.pop(slot)
        expected = [item.request_id for item in plan.items if item.request_id not in self.ended]
        failed = self.scheduler.fail(plan)
        assert list(failed) == expected
        for request_id in failed:
            self.end(request_id, "failed")

    def abort(self, request_id: str) -> None:
        assert self.scheduler.abort(request_id)
        assert not self.scheduler.abort(request_id)
        self.end(request_id, "aborted")

    def drain(self, order: random.Random) -> None:
        """Run until idle. Each round completes one step at least, so a bound on rounds shows that nobody starves."""
        tokens = sum(len(prompt) + max_tokens for prompt, max_tokens, _ in self.asked.values())
        for _ in range(20 * (tokens + 1)):
            if not self.scheduler.has_work():
                return
            for slot in order.sample(range(self.slots), self.slots):
                self.launch(slot)
            assert self.in_flight, "work, and nothing can run"
            self.land(order.choice(list(self.in_flight)))
            self.scheduler.check_integrity()
        raise AssertionError(f"starved: {self.live()}")


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(3, 14),
        block_size=st.integers(1, 4),
        slots=st.integers(1, 4),
        max_batch_tokens=st.integers(1, 12),
        max_sequences=st.integers(1, 8),
        prefix_cache=st.sampled_from([True, True, True, False]),
    )
    def start(self, num_blocks: int, block_size: int, prefix_cache: bool, **limits: int) -> None:
        self.requests = Requests(num_blocks, block_size, prefix_cache, **limits)

    @rule(
        shared=st.integers(0, 16),
        tail=st.lists(st.integers(1, 5), max_size=6),
        max_tokens=st.integers(1, 24),
        salt=st.sampled_from(["", "", "tenant"]),
        copies=st.integers(1, 3),
    )
    def arrive(self, shared: int, tail: list[int], max_tokens: int, salt: str, copies: int) -> None:
        capacity = self.requests.blocks.num_blocks * self.requests.blocks.block_size
        prompt = (tuple(range(1, shared + 1)) + tuple(tail) or (1,))[: capacity - 1]
        for _ in range(copies):
            self.requests.add(prompt, min(max_tokens, capacity - len(prompt)), salt)

    @rule(pick=st.integers(0, 3))
    def launch(self, pick: int) -> None:
        self.requests.launch(pick % self.requests.slots)

    @precondition(lambda self: self.requests.in_flight)
    @rule(pick=st.integers(0, 3))
    def land(self, pick: int) -> None:
        slots = sorted(self.requests.in_flight)
        self.requests.land(slots[pick % len(slots)])

    @rule(rounds=st.integers(1, 12), seed=st.integers(0, 99))
    def go_on(self, rounds: int, seed: int) -> None:
        """Several rounds at once, so that short examples reach deep states."""
        order = random.Random(seed)
        for _ in range(rounds):
            for slot in order.sample(range(self.requests.slots), self.requests.slots):
                self.requests.launch(slot)
            if self.requests.in_flight:
                self.requests.land(order.choice(sorted(self.requests.in_flight)))

    @precondition(lambda self: self.requests.live())
    @rule(pick=st.integers(0, 50))
    def abort(self, pick: int) -> None:
        live = self.requests.live()
        self.requests.abort(live[pick % len(live)])

    @precondition(lambda self: self.requests.in_flight)
    @rule(pick=st.integers(0, 3))
    def lose(self, pick: int) -> None:
        slots = sorted(self.requests.in_flight)
        self.requests.lose(slots[pick % len(slots)])

    @invariant()
    def accounts_agree(self) -> None:
        if not hasattr(self, "requests"):
            return
        scheduler = self.requests.scheduler
        scheduler.check_integrity()
        live = self.requests.live()
        assert [request_id for request_id, _ in scheduler.held()] == live
        assert scheduler.running + scheduler.waiting == len(live)
        assert scheduler.running <= scheduler._max_sequences

    def teardown(self) -> None:
        if not hasattr(self, "requests"):
            return
        self.requests.drain(random.Random(len(self.requests.asked)))
        assert not self.requests.live()
        assert self.requests.blocks.held_blocks == 0
        assert self.requests.scheduler.running == self.requests.scheduler.waiting == 0


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(
    max_examples=150, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
