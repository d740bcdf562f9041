"""Scheduler and block manager against a toy engine whose KV cache remembers what was written where.

The toy's KV of a position is (salt, all ids up to it). It derives a position's KV from what its block table holds for
the position before, so one wrong block, or one shared or freed too early, changes the tokens or trips an assertion.
Ids that the host does not know are taken from what the slot's step before drew.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from deployments.engine.blocks import BlockManager
from deployments.engine.budget import Chunks
from deployments.engine.scheduler import Scheduler
from deployments.engine.step import StepItem, StepPlan

END = 0
Kv = tuple[str, tuple[int, ...]]
LOST: Kv = ("not finite", ())
CHUNKS = st.builds(
    lambda decodes, mixed, *more: Chunks(tuple(sorted(decodes.items())), tuple(sorted(mixed.items())), *more),
    st.dictionaries(st.integers(1, 6), st.integers(1, 9), min_size=1, max_size=3),
    st.dictionaries(st.integers(1, 12), st.integers(1, 40), max_size=5),
    st.integers(0, 2 * 10**6),
    st.integers(1, 6),
)


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
    """Executes steps in launch order: marks at launch what it will write, and writes at landing."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.kv: dict[tuple[int, int], Kv] = {}
        self.drawn: dict[int, list[int]] = {}
        """By slot: what its latest landed step drew."""

    def places(self, item: StepItem, start: int, end: int) -> list[tuple[int, int]]:
        return [(item.block_table[p // self.block_size], p % self.block_size) for p in range(start, end)]

    def launch(self, item: StepItem, salt: str, known: tuple[int, ...]) -> None:
        """What the item reads is written, or will be by steps of the same request before it."""
        marker = being_written(item.request_id)
        for position, place in enumerate(self.places(item, 0, item.start)):
            assert self.kv[place] in ((salt, known[: position + 1]), marker)
        for place in self.places(item, item.start, item.end):
            self.kv[place] = marker

    def land(self, plan: StepPlan, salts: dict[str, str], spoiled: frozenset[str]) -> list[int]:
        """Tokens of the items that sample. What `spoiled` requests write is lost."""
        tokens = {
            item.request_id: self.run(item, salts[item.request_id], plan.slot, lost=item.request_id in spoiled)
            for item in plan.items
        }
        self.drawn[plan.slot] = [tokens[item.request_id] for item in plan.items if item.samples]
        return self.drawn[plan.slot]

    def run(self, item: StepItem, salt: str, slot: int, *, lost: bool) -> int:
        ids: tuple[int, ...] = ()
        if item.start:
            _, ids = self.kv[self.places(item, item.start - 1, item.start)[0]]
        lost |= item.start != len(ids)
        for place, token in zip(self.places(item, item.start, item.end), item.ids, strict=True):
            assert self.kv[place] == being_written(item.request_id), "others wrote here while this was in flight"
            ids = (*ids, token if token >= 0 or lost else self.drawn[slot][-1 - token])
            self.kv[place] = LOST if lost else (salt, ids)
        return END if lost else next_token(ids)


def being_written(request_id: str) -> Kv:
    return (f"being written by {request_id}", ())


class Requests:
    """The engine loop's part: who asked for what, who ended and how."""

    def __init__(self, num_blocks: int, block_size: int, prefix_cache: bool, **limits: Any) -> None:
        self.blocks = BlockManager(num_blocks, block_size, prefix_cache=prefix_cache)
        self.scheduler = Scheduler(self.blocks, **limits)
        self.slots, self.max_batch_tokens, self.lookahead = (
            limits[name] for name in ("slots", "max_batch_tokens", "lookahead")
        )
        self.engine = ToyEngine(block_size)
        self.asked: dict[str, tuple[tuple[int, ...], int, str]] = {}
        self.outputs: dict[str, list[int]] = {}
        self.ended: dict[str, str] = {}
        self.in_flight: deque[StepPlan] = deque()
        self.latest: dict[int, StepPlan] = {}
        """By slot: the step launched last."""

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

    def pending(self, request_id: str) -> int:
        return sum(item.samples for step in self.in_flight for item in step.items if item.request_id == request_id)

    def launch(self, slot: int) -> bool:
        plan = self.scheduler.schedule(slot)
        if plan is None:
            return False
        assert plan.slot == slot
        assert 0 < sum(len(item.ids) for item in plan.items) <= self.max_batch_tokens
        assert len({item.request_id for item in plan.items}) == len(plan.items), "a sequence is twice in a step"
        for item in plan.items:
            self.check_item(item, self.latest.get(slot))
            self.engine.launch(item, self.asked[item.request_id][2], self.known(item.request_id))
        self.latest[slot] = plan
        self.in_flight.append(plan)
        assert sum(step.slot == slot for step in self.in_flight) <= 1 + self.lookahead
        return True

    def check_item(self, item: StepItem, before: StepPlan | None) -> None:
        assert item.request_id not in self.ended
        known = self.known(item.request_id)
        if item.ids[0] < 0:
            assert before in self.in_flight, "a pending id whose step the host has read"
            drawn = [other.request_id for other in before.items if other.samples]
            assert (item.start, len(item.ids)) == (len(known), 1)
            assert drawn[-1 - item.ids[0]] == item.request_id
        else:
            assert item.ids == known[item.start : item.end]
        assert item.samples == (item.end == len(known) + self.pending(item.request_id))
        assert len(item.block_table) == -(-item.end // self.engine.block_size)
        _, max_tokens, _ = self.asked[item.request_id]
        assert len(self.outputs[item.request_id]) + self.pending(item.request_id) < max_tokens, "runs over max_tokens"

    def land(self, spoil_each: int = 0) -> None:
        """The oldest step; of the requests that it draws a token for, the logits of each n-th are not finite."""
        plan = self.in_flight.popleft()
        sampled = [item.request_id for item in plan.items if item.samples]
        spoiled = frozenset(sampled[::spoil_each] if spoil_each else ())
        drawn = self.engine.land(plan, {request_id: salt for request_id, (_, _, salt) in self.asked.items()}, spoiled)
        tokens = {
            request_id: token for request_id, token in zip(sampled, drawn, strict=True) if request_id not in self.ended
        }
        self.scheduler.complete(plan, drawn, spoiled)
        for request_id, token in tokens.items():
            if request_id in spoiled:
                self.scheduler.finish(request_id)
                self.end(request_id, "spoiled")
            else:
                self.take_token(request_id, token)

    def take_token(self, request_id: str, token: int) -> None:
        self.outputs[request_id].append(token)
        assert self.scheduler.sequence(request_id).output_ids == self.outputs[request_id]
        prompt, max_tokens, _ = self.asked[request_id]
        if token == END or len(self.outputs[request_id]) == max_tokens:
            self.scheduler.finish(request_id)
            self.end(request_id, "finished")
            assert self.outputs[request_id] == sequential(prompt, max_tokens)

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
            self.launch_all(order)
            assert self.in_flight, "work, and nothing can run"
            self.land()
            self.scheduler.check_integrity()
        raise AssertionError(f"starved: {self.live()}")

    def launch_all(self, order: random.Random) -> None:
        """Every slot that may take a step takes one, and another if it may look ahead."""
        for _ in range(1 + self.lookahead):
            for slot in order.sample(range(self.slots), self.slots):
                self.launch(slot)


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(3, 14),
        block_size=st.integers(1, 4),
        slots=st.integers(1, 4),
        max_batch_tokens=st.integers(1, 12),
        max_sequences=st.integers(1, 8),
        chunks=CHUNKS,
        lookahead=st.integers(0, 1),
        prefix_cache=st.sampled_from([True, True, True, False]),
    )
    def start(self, num_blocks: int, block_size: int, prefix_cache: bool, **limits: Any) -> None:
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
    @rule()
    def land(self) -> None:
        self.requests.land()

    @rule(rounds=st.integers(1, 12), seed=st.integers(0, 99))
    def go_on(self, rounds: int, seed: int) -> None:
        """Several rounds at once, so that short examples reach deep states."""
        order = random.Random(seed)
        for _ in range(rounds):
            self.requests.launch_all(order)
            if self.requests.in_flight:
                self.requests.land()

    @precondition(lambda self: self.requests.live())
    @rule(pick=st.integers(0, 50))
    def abort(self, pick: int) -> None:
        live = self.requests.live()
        self.requests.abort(live[pick % len(live)])

    @precondition(lambda self: self.requests.in_flight)
    @rule(each=st.integers(1, 3))
    def spoil(self, each: int) -> None:
        self.requests.land(spoil_each=each)

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
        named = Counter(item.request_id for step in self.requests.in_flight for item in step.items)
        for request_id, steps in named.items():
            assert scheduler.sequence(request_id).in_flight == steps
            assert self.requests.blocks.held(request_id) > 0, "blocks of a step in flight were freed"

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


class WholePromptsMachine(SchedulerMachine):
    """With prompts that an encoder reads: each is computed in one step, so every item samples."""

    @initialize(
        num_blocks=st.integers(3, 14),
        block_size=st.integers(1, 4),
        slots=st.integers(1, 4),
        max_sequences=st.integers(1, 8),
        chunks=CHUNKS,
        lookahead=st.integers(0, 1),
    )
    def start(self, num_blocks: int, block_size: int, max_sequences: int, **limits: Any) -> None:
        room = num_blocks * block_size + max_sequences
        self.requests = Requests(
            num_blocks,
            block_size,
            prefix_cache=False,
            max_batch_tokens=room,
            max_sequences=max_sequences,
            whole_prompts=True,
            **limits,
        )

    @invariant()
    def no_prompt_is_cut(self) -> None:
        if hasattr(self, "requests"):
            assert all(item.samples for step in self.requests.in_flight for item in step.items)


TestWholePromptsMachine = WholePromptsMachine.TestCase
TestWholePromptsMachine.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
