"""Decides what each step computes: continuous batching with chunked prefill, over paged blocks. No tensors here.

Arrival is the one priority. Sequences wait in order of arrival, are admitted from the head alone, and when blocks run
out the youngest gives way. So the oldest always advances, and nobody starves.

A pipeline of N stages runs N slots: a sequence stays in one slot while it runs, and a slot has at most one step in
flight. Steps of different slots complete in any order. Blocks named by a step in flight stay held until it completes.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, count, islice
from operator import attrgetter

from deployments.engine.blocks import BlockManager, IntegrityError
from deployments.engine.sequence import TokenSequence
from deployments.errors import HeadroomError

_by_arrival = attrgetter("arrival")


class TooLong(HeadroomError, ValueError):
    """A request that no number of preemptions could fit: `need` and `have` are tokens."""

    def __init__(self, request_id: str, need: int, have: int) -> None:
        super().__init__(
            f"request {request_id} needs {need} tokens of KV cache for prompt and max_tokens, the replica has {have}; "
            "lower max_tokens, shorten the prompt, or give the KV cache more memory"
        )
        self.need = need
        self.have = have


@dataclass(frozen=True, slots=True)
class StepItem:
    """One sequence's part of a step."""

    request_id: str
    start: int
    """Position of the first token computed; the KV of all positions before it is written."""
    ids: tuple[int, ...]
    """The tokens fed, at positions start, start + 1, ..."""
    block_table: tuple[int, ...]
    """Blocks of positions 0 .. start + len(ids) - 1; position p is in block_table[p // block_size]."""
    samples: bool
    """Whether `ids` ends with the last known token, so that the next one is sampled."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One micro-batch: what one slot computes next."""

    slot: int
    step: int
    """Unique, rising with each step scheduled."""
    items: tuple[StepItem, ...]


class Scheduler:
    """Queues and budgets in, `StepPlan`s out.

    The engine calls `schedule(slot)` for every slot without a step in flight, runs the plan, then `complete`s it and
    `finish`es each sequence that reached its end, before it schedules again.

    Args:
        blocks: accounts of the KV cache; the scheduler alone changes them.
        slots: micro-batches in flight at once; the number of stages.
        max_batch_tokens: most tokens of one step.
        max_sequences: most sequences running at once, over all slots.
    """

    def __init__(self, blocks: BlockManager, *, slots: int, max_batch_tokens: int, max_sequences: int) -> None:
        if min(slots, max_batch_tokens, max_sequences) < 1:
            raise ValueError(f"must be at least 1 each: {slots=}, {max_batch_tokens=}, {max_sequences=}")
        self.preemptions = 0
        self._blocks = blocks
        self._max_batch_tokens = max_batch_tokens
        self._max_sequences = max_sequences
        self._sequences: dict[str, TokenSequence] = {}
        self._waiting: list[TokenSequence] = []  # this and each list of _running: in order of arrival
        self._running: list[list[TokenSequence]] = [[] for _ in range(slots)]
        self._launched: list[StepPlan | None] = [None] * slots
        self._arrivals = count()
        self._steps = count(1)
        self._turns = count(1)

    @property
    def running(self) -> int:
        """Sequences that hold a place in a slot."""
        return sum(map(len, self._running))

    @property
    def waiting(self) -> int:
        """Sequences not admitted yet, or preempted."""
        return len(self._waiting)

    def has_work(self) -> bool:
        """Whether any sequence waits, runs, or is named by a step in flight."""
        return bool(self._sequences)

    def sequence(self, request_id: str) -> TokenSequence:
        """The sequence of a request; KeyError once it has ended and no step names it."""
        return self._sequences[request_id]

    def held(self) -> Iterator[tuple[str, int]]:
        """(request id, blocks in its table) of every request not ended; 0 blocks for one that waits."""
        for request_id, sequence in self._sequences.items():
            if sequence.state != "finished":
                yield request_id, self._blocks.held(request_id)

    def add(self, request_id: str, prompt_ids: tuple[int, ...], *, max_tokens: int, salt: str = "") -> None:
        """Queue a request.

        Raises:
            TooLong: prompt and max_tokens are more than all blocks hold.
            ValueError: empty prompt, max_tokens below 1, or an id that is in use.
        """
        if request_id in self._sequences:
            raise ValueError(f"request id {request_id} is in use")
        if not prompt_ids or max_tokens < 1:
            raise ValueError(f"request {request_id} has {len(prompt_ids)} prompt tokens and {max_tokens=}; both need 1")
        need, have = len(prompt_ids) + max_tokens, self._blocks.num_blocks * self._blocks.block_size
        if need > have:
            raise TooLong(request_id, need, have)
        self._sequences[request_id] = TokenSequence(request_id, prompt_ids, salt, max_tokens, next(self._arrivals))
        self._waiting.append(self._sequences[request_id])

    def abort(self, request_id: str) -> bool:
        """End a request at any time; False if it is unknown or ended already.

        Its blocks are free at once, or when the step in flight that names it completes.
        """
        sequence = self._sequences.get(request_id)
        if sequence is None or sequence.state == "finished":
            return False
        self._end(sequence)
        return True

    def finish(self, request_id: str) -> None:
        """End a request that produced its last token. Raises KeyError if it is unknown or ended already."""
        if not self.abort(request_id):
            raise KeyError(request_id)

    def schedule(self, slot: int) -> StepPlan | None:
        """The slot's next step, launched from here on: decodes, then prefill chunks, then admissions.

        Returns:
            None when the slot has nothing to do now, or has a step in flight.

        Raises:
            RuntimeError: a running sequence has its `max_tokens` and was not finished.
        """
        if self._launched[slot] is not None:
            return None
        budget = self._max_batch_tokens
        items = [self._launch(s, 1) for s in self._decodes(slot, budget) if self._make_room(s)]
        budget -= len(items)
        for sequence in self._running[slot]:
            if budget and sequence.remaining > 1:
                items.append(self._launch(sequence, budget))
                budget -= len(items[-1].ids)
        share = self._even_share()
        while budget and len(self._running[slot]) < share and (admitted := self._admit(slot)):
            items.append(self._launch(admitted, budget))
            budget -= len(items[-1].ids)
        self._launched[slot] = StepPlan(slot, next(self._steps), tuple(items)) if items else None
        return self._launched[slot]

    def complete(self, step: StepPlan, tokens: Mapping[str, int], spoiled: frozenset[str] = frozenset()) -> None:
        """Take back a step that ran: KV is written, and `tokens` has the id sampled for each item that samples.

        A token of a sequence that ended meanwhile is ignored, and may be left out. The KV of `spoiled` requests (their
        logits were not finite) is not offered to the prefix cache.

        Raises:
            ValueError: the step is not in flight, or `tokens` doesn't match its items; nothing was changed.
        """
        self._check_tokens(step, tokens)
        written = frozenset(item.request_id for item in step.items) - spoiled
        for sequence, item in self._land(step, written):
            if item.samples:
                sequence.output_ids.append(tokens[item.request_id])
                sequence.ids.append(tokens[item.request_id])

    def fail(self, step: StepPlan) -> tuple[str, ...]:
        """Take back a step that did not run to its end: its KV can't be trusted, so its sequences end.

        Returns:
            Ids of the requests that ended by this; those that had ended before are not among them.

        Raises:
            ValueError: the step is not in flight.
        """
        self._check_launched(step)
        lost = [sequence for sequence, _ in self._land(step, frozenset())]
        for sequence in lost:
            self._end(sequence)
        return tuple(sequence.request_id for sequence in lost)

    def check_integrity(self) -> None:
        """Compare queues, slots, steps in flight and block accounts.

        Raises:
            IntegrityError: names what is wrong.
        """
        self._blocks.check_integrity()
        known = self._sequences.values()
        launched = [item.request_id for step in self._launched if step for item in step.items]
        flying = [s.request_id for s in known if s.in_flight]
        holding = {s.request_id for s in known if s.in_flight or s.state == "running"}
        queued = [*self._waiting, *chain.from_iterable(self._running)]
        live = [s for s in known if s.state != "finished"]
        checks = {
            "sequences in flight differ from the launched steps": sorted(flying) == sorted(launched),
            "block tables differ from the sequences that run": self._blocks.open_tables == holding,
            "queues differ from the sequences not ended": sorted(map(id, queued)) == sorted(map(id, live)),
            "a queue is not in order of arrival": all(
                queue == sorted(queue, key=_by_arrival) for queue in (self._waiting, *self._running)
            ),
            "a waiting sequence has a slot": all(s.state == "waiting" and s.slot is None for s in self._waiting),
            "a sequence is in another slot than it says": all(
                s.state == "running" and s.slot == slot for slot, running in enumerate(self._running) for s in running
            ),
            "blocks are held while idle": bool(self._sequences) or self._blocks.held_blocks == 0,
        }
        if wrong := [what for what, holds in checks.items() if not holds]:
            raise IntegrityError("; ".join(wrong))

    def _decodes(self, slot: int, budget: int) -> list[TokenSequence]:
        """Sequences with one token to compute, oldest first; they take turns when the budget is too small for all."""
        ready = [s for s in self._running[slot] if s.remaining == 1]
        for sequence in ready:
            if len(sequence.output_ids) >= sequence.max_tokens:
                raise RuntimeError(f"request {sequence.request_id} has its {sequence.max_tokens} tokens: finish it")
        if len(ready) <= budget:
            return ready
        picked = sorted(ready, key=attrgetter("turn"))[:budget]
        for sequence in picked:
            sequence.turn = next(self._turns)
        return sorted(picked, key=_by_arrival)

    def _make_room(self, sequence: TokenSequence) -> bool:
        """Grow the table for the next token, at the cost of younger sequences; False if it can't run this step."""
        while sequence.state == "running":
            if self._blocks.can_grow(sequence.request_id, len(sequence.ids)):
                self._blocks.grow(sequence.request_id, len(sequence.ids))
                return True
            victim = self._victim(sequence)
            if victim is None:
                return False
            self._preempt(victim)
        return False

    def _victim(self, growing: TokenSequence) -> TokenSequence | None:
        """The youngest running sequence that isn't in flight: `growing` itself if all others are older.

        None if it would be `growing` while a younger or ended one is in flight: that one gives way first. With no block
        free it gets at most to the end of its last block, so the wait is short.
        """
        youngest = max((s for s in chain.from_iterable(self._running) if not s.in_flight), key=_by_arrival)
        if youngest is growing and any(
            s.in_flight and (s.state == "finished" or s.arrival > growing.arrival) for s in self._sequences.values()
        ):
            return None
        return youngest

    def _preempt(self, sequence: TokenSequence) -> None:
        self._leave_slot(sequence)
        self._blocks.close(sequence.request_id)
        sequence.state = "waiting"
        sequence.computed = 0
        sequence.preemptions += 1
        self.preemptions += 1
        insort(self._waiting, sequence, key=_by_arrival)

    def _even_share(self) -> int:
        """Sequences that each slot would run if all that fit now were admitted and spread evenly.

        Cached prefixes are not looked up: the count may be low, but is 1 at least, so that the head has a slot.
        """
        running, free, fit = self.running, self._blocks.free_blocks, 0
        for sequence in islice(self._waiting, max(0, self._max_sequences - running)):
            free -= self._blocks.blocks_for(len(sequence.ids))
            if free < 0:
                break
            fit += 1
        return -(-(running + max(fit, 1)) // len(self._running))

    def _admit(self, slot: int) -> TokenSequence | None:
        """Move the head of the queue into the slot if blocks for all its tokens are free.

        While others run one block more must be free, or the newcomer would be preempted at their next growth.
        """
        running = self.running
        if not self._waiting or running >= self._max_sequences:
            return None
        sequence = self._waiting[0]
        request_id, tokens = sequence.request_id, len(sequence.ids)
        spare = self._blocks.block_size if running else 0
        cached = self._blocks.open(request_id, sequence.ids, sequence.salt, digests=sequence.digests)
        if not self._blocks.can_grow(request_id, tokens + spare):
            self._blocks.close(request_id)
            return None
        self._blocks.grow(request_id, tokens)
        if not sequence.preemptions:
            sequence.cached_tokens = cached
        sequence.state, sequence.slot, sequence.computed = "running", slot, cached
        insort(self._running[slot], self._waiting.pop(0), key=_by_arrival)
        return sequence

    def _launch(self, sequence: TokenSequence, budget: int) -> StepItem:
        start = sequence.computed
        end = start + min(sequence.remaining, budget)
        sequence.computed, sequence.in_flight = end, True
        ids = tuple(sequence.ids[start:end])
        table = tuple(self._blocks.table(sequence.request_id)[: self._blocks.blocks_for(end)])
        return StepItem(sequence.request_id, start, ids, table, samples=end == len(sequence.ids))

    def _land(self, step: StepPlan, written: frozenset[str]) -> list[tuple[TokenSequence, StepItem]]:
        """Take a step out of flight, and release those that ended meanwhile; returns the others.

        The KV of the `written` requests is offered to the prefix cache.
        """
        self._launched[step.slot] = None
        live = []
        for item in step.items:
            sequence = self._sequences[item.request_id]
            sequence.in_flight = False
            if item.request_id in written:
                self._blocks.commit(item.request_id, sequence.ids, item.start + len(item.ids))
            if sequence.state == "finished":
                self._release(sequence)
            else:
                live.append((sequence, item))
        return live

    def _check_launched(self, step: StepPlan) -> None:
        if self._launched[step.slot] is not step:
            raise ValueError(f"step {step.step} of slot {step.slot} is not in flight")

    def _check_tokens(self, step: StepPlan, tokens: Mapping[str, int]) -> None:
        self._check_launched(step)
        sampling = {item.request_id for item in step.items if item.samples}
        needed = {request_id for request_id in sampling if self._sequences[request_id].state == "running"}
        if not needed <= tokens.keys() <= sampling:
            raise ValueError(f"step {step.step} needs tokens of {sorted(needed)}, got those of {sorted(tokens)}")

    def _end(self, sequence: TokenSequence) -> None:
        if sequence.state == "waiting":
            self._waiting.remove(sequence)
        else:
            self._leave_slot(sequence)
        sequence.state = "finished"
        if not sequence.in_flight:
            self._release(sequence)

    def _release(self, sequence: TokenSequence) -> None:
        if sequence.request_id in self._blocks.open_tables:
            self._blocks.close(sequence.request_id)
        del self._sequences[sequence.request_id]

    def _leave_slot(self, sequence: TokenSequence) -> None:
        assert sequence.slot is not None, f"{sequence.request_id} runs in no slot"
        self._running[sequence.slot].remove(sequence)
        sequence.slot = None
