"""Decides what each step computes: continuous batching with chunked prefill, over paged blocks. No tensors here.

Arrival is the one priority. Sequences wait in order of arrival, are admitted from the head alone, and when blocks run
out the youngest gives way. So the oldest always advances, and nobody starves.

A pipeline of N stages runs N slots: a sequence decodes in one slot. With `lookahead` a slot has a step scheduled while
the one before is in flight; that step then feeds tokens which are drawn, but not read yet. Steps leave the pipeline in
the order in which they were launched. Blocks stay held until the last step in flight that names them is complete.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import count, islice
from operator import attrgetter

from deployments.engine.blocks import BlockManager, IntegrityError
from deployments.engine.budget import Chunks, prefill_budget
from deployments.engine.queues import Queues, by_arrival
from deployments.engine.sequence import TokenSequence, TooLong
from deployments.engine.step import StepItem, StepPlan


class Scheduler:
    """Queues and budgets in, `StepPlan`s out.

    The engine calls `schedule(slot)` for every slot, runs the plans in that order, then `complete`s the oldest and
    `finish`es each sequence that reached its end, before it schedules again.

    Args:
        blocks: accounts of the KV cache; the scheduler alone changes them.
        slots: micro-batches that the pipeline holds at once; the number of stages.
        max_batch_tokens: most tokens of one step.
        max_sequences: most sequences running at once, over all slots.
        chunks: prompt tokens in a step while sequences decode, see `prefill_budget`.
        lookahead: steps of a slot, 0 or 1, that are scheduled while the one before is in flight.
        whole_prompts: a prompt is computed in one step, as an encoder needs it. A step of `max_batch_tokens` must have
            room for `max_sequences` decodes and the longest sequence; one prompt may go beside decodes at any time.
    """

    def __init__(
        self,
        blocks: BlockManager,
        *,
        slots: int,
        max_batch_tokens: int,
        max_sequences: int,
        chunks: Chunks,
        lookahead: int,
        whole_prompts: bool = False,
    ) -> None:
        if min(slots, max_batch_tokens, max_sequences) < 1:
            raise ValueError(f"must be at least 1 each: {slots=}, {max_batch_tokens=}, {max_sequences=}")
        if lookahead not in (0, 1):
            raise ValueError(f"a step can only feed ids that the step before it drew: {lookahead=} must be 0 or 1")
        self.preemptions = 0
        self._blocks = blocks
        self._max_batch_tokens = max_batch_tokens
        self._max_sequences = max_sequences
        self._chunks = chunks
        self._lookahead = lookahead
        self._whole_prompts = whole_prompts
        self._sequences: dict[str, TokenSequence] = {}
        self._queues = Queues(slots)
        self._launched: deque[StepPlan] = deque()
        self._in_flight = [0] * slots
        """Steps launched, by slot."""
        self._starved: TokenSequence | None = None
        """The oldest sequence that needs a block and waits for one: nobody else takes any."""
        self._yielding: TokenSequence | None = None
        """The one that will be preempted for `_starved` once it isn't in flight: it is not launched again."""
        self._arrivals, self._steps, self._turns = count(), count(1), count(1)

    @property
    def running(self) -> int:
        """Sequences that hold a place in a slot."""
        return sum(map(len, self._queues.slots))

    @property
    def waiting(self) -> int:
        """Sequences not admitted yet, or preempted."""
        return len(self._queues.waiting)

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
        self._queues.wait(self._sequences[request_id])

    def abort(self, request_id: str) -> bool:
        """End a request at any time; False if it is unknown or ended already.

        Its blocks are free at once, or when the last step in flight that names it completes.
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

        What budget is left goes to prompts of other slots, whose chunks then enter the pipeline one after the other.

        Returns:
            None when the slot has nothing to do now, or as many steps in flight as it may have.

        Raises:
            RuntimeError: a running sequence has its `max_tokens` and was not finished.
        """
        if self._in_flight[slot] > self._lookahead:
            return None
        items = self._decode(slot)
        row = len(items)
        for item in self._prefill(slot, items):
            items.append(item)
            if item.samples:
                self._sequences[item.request_id].expect(row)
                row += 1
        if not items:
            return None
        self._in_flight[slot] += 1
        self._launched.append(StepPlan(slot, next(self._steps), tuple(items), row))
        return self._launched[-1]

    def complete(self, step: StepPlan, tokens: Sequence[int], spoiled: Iterable[str] = ()) -> None:
        """Take back a step that ran: KV is written, and `tokens` are the ids of the items that sample, in order.

        A token of a sequence that ended meanwhile is ignored. The KV of tokens that are known is offered to the prefix
        cache, but not that of the `spoiled` requests: their logits were not finite.

        Raises:
            ValueError: the step is not the oldest in flight, or has not as many tokens; nothing was changed.
        """
        if not self._launched or self._launched[0] is not step:
            raise ValueError(f"step {step.step} of slot {step.slot} is not the oldest in flight")
        if len(tokens) != step.sampled:
            raise ValueError(f"step {step.step} of slot {step.slot} samples {step.sampled} tokens, got {len(tokens)}")
        self._launched.popleft()
        self._in_flight[step.slot] -= 1
        for request_id in spoiled:
            self._sequences[request_id].cacheable = False
        size, sequences, drawn = self._blocks.block_size, self._sequences, iter(tokens)
        for item in step.items:
            request_id, start, ids, _, samples = item
            sequence = sequences[request_id]
            sequence.in_flight -= 1
            if (start + len(ids)) % size < len(ids):  # a block may be full: few decodes' steps fill one
                self._commit(sequence, item)
            token = next(drawn) if samples else None
            if sequence.state == "finished":
                sequence.length -= samples
                if not sequence.in_flight:
                    self._release(sequence)
            elif token is not None:
                sequence.ids.append(token)

    def check_integrity(self) -> None:
        """Compare queues, slots, steps in flight and block accounts.

        Raises:
            IntegrityError: names what is wrong.
        """
        self._blocks.check_integrity()
        known = self._sequences.values()
        items = [item for step in self._launched for item in step.items]
        flights = Counter(item.request_id for item in items)
        draws = Counter(item.request_id for item in items if item.samples)
        holding = {s.request_id for s in known if s.in_flight or s.state == "running"}
        queued = [*self._queues.waiting, *self._queues.running()]
        live = [s for s in known if s.state != "finished"]
        checks = {
            "sequences in flight differ from the launched steps": flights
            == {s.request_id: s.in_flight for s in known if s.in_flight},
            "pending tokens differ from the launched steps": draws
            == {s.request_id: s.pending for s in known if s.pending},
            "block tables differ from the sequences that run": self._blocks.open_tables == holding,
            "steps in flight are miscounted": self._in_flight
            == [sum(step.slot == slot for step in self._launched) for slot in range(len(self._in_flight))],
            "queues differ from the sequences not ended": sorted(map(id, queued)) == sorted(map(id, live)),
            **self._queues.checks(),
            "blocks are kept for a sequence that doesn't run": all(
                s is None or s.state == "running" for s in (self._starved, self._yielding)
            ),
            "blocks are held while idle": bool(self._sequences) or self._blocks.held_blocks == 0,
        }
        if wrong := [what for what, holds in checks.items() if not holds]:
            raise IntegrityError("; ".join(wrong))

    def _decode(self, slot: int) -> list[StepItem]:
        """Launch the sequences that have one token to compute, and room for it, oldest first."""
        items: list[StepItem] = []
        size = self._blocks.block_size
        for sequence in self._ready(slot):
            start = sequence.computed
            # The blocks of its last step mostly have room for one token more.
            if len(sequence.block_table) * size <= start or sequence is self._yielding:
                if not self._make_room(sequence):
                    continue
                self._name_blocks(sequence, start + 1)
            ids = sequence.decode(len(items))
            items.append(StepItem(sequence.request_id, start, ids, sequence.block_table, True))
        return items

    def _ready(self, slot: int) -> list[TokenSequence]:
        """Sequences with one token to compute, oldest first; they take turns when the budget is too small for all."""
        running = self._queues.slots[slot]
        ready = [s for s in running if s.length - s.computed == 1 and s.length < s.longest]
        if len(ready) < len(running):
            for sequence in running:
                if len(sequence.ids) >= sequence.longest:
                    raise RuntimeError(f"request {sequence.request_id} has its {sequence.max_tokens} tokens: finish it")
        if len(ready) <= self._max_batch_tokens:
            return ready
        picked = sorted(ready, key=attrgetter("turn"))[: self._max_batch_tokens]
        for sequence in picked:
            sequence.turn = next(self._turns)
        return sorted(picked, key=by_arrival)

    def _prefill(self, slot: int, decodes: list[StepItem]) -> list[StepItem]:
        """Prompts for the budget that a step of these decodes has left."""
        prompts = [s for s in self._queues.prompts() if s.remaining > 1]
        if not prompts and not self._queues.waiting:
            return []
        fit = self._fitting()
        budget = prefill_budget(
            decodes=len(decodes),
            kv_tokens=sum(item.end for item in decodes),
            decoding=self.running - len(prompts),
            prefilling=len(prompts) + fit,
            max_batch_tokens=self._max_batch_tokens,
            chunks=self._chunks,
        )
        items: list[StepItem] = []
        candidates = self._candidates(slot, prompts, fit)
        while budget > 0 and (candidate := next(candidates, None)):  # asked for one by one: asking may admit
            sequence, most = candidate
            if self._whole_prompts and most > budget and items:
                break
            items.append(self._launch(sequence, most if self._whole_prompts else min(most, budget)))
            budget -= len(items[-1].ids)
        return items

    def _candidates(self, slot: int, prompts: list[TokenSequence], fit: int) -> Iterator[tuple[TokenSequence, int]]:
        """Prompts that the slot may compute, each with the most tokens of it: its own, then new ones, then others'.

        The end of another slot's prompt is left to that slot, where the sequence decodes.
        """
        able = [s for s in prompts if s is not self._yielding]
        yield from ((s, s.remaining) for s in able if s.slot == slot)
        share = -(-(self.running + max(fit, 1)) // len(self._queues.slots))
        while len(self._queues.slots[slot]) < share and (admitted := self._admit(slot)):
            yield admitted, admitted.remaining
        yield from ((s, s.remaining - 1) for s in able if s.slot != slot and s.in_flight)

    def _make_room(self, sequence: TokenSequence) -> bool:
        """Grow the table for the next token, at the cost of younger sequences; False if it can't run this step.

        The youngest sequence gives way, `sequence` itself if all others are older. One in flight does so when it has
        landed; and blocks that ended sequences in flight are about to leave are waited for.
        """
        if sequence.state != "running" or (sequence is self._yielding and sequence is not self._starved):
            return False
        if self._blocks.held(sequence.request_id) >= self._blocks.blocks_for(sequence.length):
            return True
        if self._starved is not None and self._starved.arrival < sequence.arrival:
            return False
        while not self._blocks.can_grow(sequence.request_id, sequence.length):
            youngest = self._queues.youngest()
            ending = any(s.state == "finished" for s in self._sequences.values())
            if ending or youngest.in_flight:
                self._starved, self._yielding = sequence, None if ending else youngest
                return False
            self._preempt(youngest)
            if youngest is sequence:
                return False
        self._blocks.grow(sequence.request_id, sequence.length)
        if sequence is self._starved:
            self._starved = self._yielding = None
        return True

    def _preempt(self, sequence: TokenSequence) -> None:
        self._leave(sequence)
        self._blocks.close(sequence.request_id)
        sequence.set_back()
        self.preemptions += 1
        self._queues.wait(sequence)

    def _fitting(self) -> int:
        """Waiting sequences that would run if all that fit now were admitted.

        Cached prefixes are not looked up, so the count may be low.
        """
        free, fit = self._blocks.free_blocks, 0
        for sequence in islice(self._queues.waiting, max(0, self._max_sequences - self.running)):
            free -= self._blocks.blocks_for(sequence.length)
            if free < 0:
                break
            fit += 1
        return fit

    def _admit(self, slot: int) -> TokenSequence | None:
        """Move the head of the queue into the slot if blocks for all its tokens are free.

        While others run one block more must be free, or the newcomer would be preempted at their next growth.
        """
        running = self.running
        if not self._queues.waiting or running >= self._max_sequences or self._starved is not None:
            return None
        sequence = self._queues.waiting[0]
        request_id, tokens = sequence.request_id, len(sequence.ids)
        spare = self._blocks.block_size if running else 0
        cached = self._blocks.open(request_id, sequence.ids, sequence.salt, digests=sequence.digests)
        if not self._blocks.can_grow(request_id, tokens + spare):
            self._blocks.close(request_id)
            return None
        self._blocks.grow(request_id, tokens)
        if not sequence.preemptions:
            sequence.cached_tokens = cached
        sequence.computed = cached
        self._queues.enter(slot)
        return sequence

    def _launch(self, sequence: TokenSequence, tokens: int) -> StepItem:
        start = sequence.computed
        end = sequence.computed = start + tokens
        sequence.in_flight += 1
        self._name_blocks(sequence, end)
        ids = tuple(sequence.ids[start:end])
        return StepItem(sequence.request_id, start, ids, sequence.block_table, end == sequence.length)

    def _name_blocks(self, sequence: TokenSequence, end: int) -> None:
        """Let its block table be that of a step that computes up to `end`."""
        blocks = self._blocks.blocks_for(end)
        if len(sequence.block_table) != blocks:
            sequence.block_table = tuple(self._blocks.table(sequence.request_id)[:blocks])

    def _commit(self, sequence: TokenSequence, item: StepItem) -> None:
        """Offer the blocks that a step filled to the prefix cache, as far as their tokens are known."""
        end, size = min(item.end, len(sequence.ids)), self._blocks.block_size
        if sequence.cacheable and end // size > item.start // size:
            self._blocks.commit(sequence.request_id, sequence.ids, end)

    def _end(self, sequence: TokenSequence) -> None:
        self._leave(sequence)
        sequence.state = "finished"
        if sequence.in_flight:
            self._blocks.retire(sequence.request_id)
        else:
            self._release(sequence)

    def _release(self, sequence: TokenSequence) -> None:
        if sequence.request_id in self._blocks.open_tables:
            self._blocks.close(sequence.request_id)
        del self._sequences[sequence.request_id]

    def _leave(self, sequence: TokenSequence) -> None:
        """Out of its queue; no blocks are kept for it, or taken from it for another, any more."""
        self._queues.leave(sequence)
        if sequence is self._starved:
            self._starved = self._yielding = None
        elif sequence is self._yielding:
            self._yielding = None
