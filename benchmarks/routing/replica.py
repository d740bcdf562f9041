"""A simulated replica: continuous batching with chunked prefill over paged KV blocks.

The rules are those of the engine's scheduler with one slot: decodes first, then prompt chunks by the engine's own
`prefill_budget`, then admission from the head of the queue when all of a sequence's tokens and one spare block fit;
when blocks run out the youngest sequence is preempted and later recomputed.

A step costs O(1) plus what changes in it, because every decoding sequence advances by one token a step: a sequence
takes a new block in the steps of one residue class modulo the block size, and its last step is known when it starts to
decode. Steps in which no prompt is computed and nothing ends are run as one stretch.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field
from itertools import count

from benchmarks.routing.fleet import ReplicaSpec
from benchmarks.routing.histogram import Histogram
from benchmarks.routing.job import GRANULE, Job
from benchmarks.routing.prefix_cache import PrefixCache
from deployments.engine.budget import prefill_budget


@dataclass(slots=True, eq=False)
class Sequence:
    """A job on this replica."""

    job: Job
    order: int
    """Place in the order of arrival on this replica."""
    produced: int = 0
    remaining: int = 0
    """Tokens to compute before it decodes."""
    prefilled: int = 0
    """Tokens of the prefill that is under way, or was last."""
    origin: int = 0
    """While decoding: its length is `origin` + the replica's step number."""
    last_step: int = 0
    last_token_at: float = 0.0
    refs: list[int] = field(default_factory=list)
    """Granules of the prefix cache that it uses."""
    place: str = "waiting"


class SimReplica:
    """One replica. Callers hand in jobs with `submit` and call `advance` at `busy_until`."""

    def __init__(self, spec: ReplicaSpec, gaps: Histogram) -> None:
        self.spec = spec
        self._beside = spec.chunks
        self.gaps = gaps
        self.cache = PrefixCache()
        self.free_blocks = spec.capacity_blocks
        self.preemptions = 0
        self.busy_until: float | None = None
        """When the steps under way end; None while idle."""
        self.used_area = 0.0
        """Referenced blocks times seconds."""
        self.waiting: deque[Sequence] = deque()
        self.prefilling: list[Sequence] = []
        self.decoding: dict[int, Sequence] = {}
        """By order; insertion is not by order."""
        self._per_granule = GRANULE // spec.block_size
        self._submitted = 0
        self._step = 0
        self._grown = 0
        """1 while the blocks of the decodes under way are taken."""
        self._lengths = 0
        """Sum of the lengths of the decoding sequences."""
        self._growing: list[set[int]] = [set() for _ in range(spec.block_size)]
        self._ends: list[tuple[int, int, Sequence]] = []
        """A heap of (last step, tie-break, sequence); entries of preempted sequences are skipped."""
        self._pushed = count()
        self._started_at = 0.0
        self._stretch = 0
        """Pure decode steps under way, as one; 0 while the step has chunks."""
        self._chunks: list[tuple[Sequence, int]] = []
        self._measured_at = 0.0

    @property
    def used_blocks(self) -> int:
        """Blocks in use by sequences."""
        return self.spec.capacity_blocks - self.free_blocks

    @property
    def shared_blocks(self) -> int:
        """How much less than the sum of all tables is in use, because tables share granules."""
        return sum(self.held_blocks(sequence) for sequence in self.sequences()) - self.used_blocks

    @property
    def running(self) -> int:
        """Sequences that hold blocks."""
        return len(self.prefilling) + len(self.decoding)

    @property
    def ongoing(self) -> int:
        """Jobs not ended."""
        return self.running + len(self.waiting)

    def held_blocks(self, sequence: Sequence) -> int:
        """Blocks in the table of one sequence, shared ones included."""
        if sequence.place == "decoding":
            return self._blocks(sequence.origin + self._step + self._grown)
        return self._blocks(sequence.prefilled) if sequence.place == "prefilling" else 0

    def produced(self, sequence: Sequence) -> int:
        """Tokens that it has produced, as of the last step that is accounted for."""
        if sequence.place == "decoding":
            return sequence.job.output - (sequence.last_step - self._step)
        return sequence.produced

    def sequences(self) -> list[Sequence]:
        """Those that hold blocks."""
        return [*self.prefilling, *self.decoding.values()]

    def submit(self, job: Job, now: float) -> None:
        """A job arrives; what runs is cut at the end of its current step when the job might start then."""
        first = not self.waiting
        self.waiting.append(Sequence(job, self._submitted))
        self._submitted += 1
        if self.busy_until is None:
            self._measure(now)
            self._begin(now)
        elif first and self._stretch > 1:
            self._cut(now)

    def withdraw(self, job: Job) -> bool:
        """Take out a job that was never admitted; False when it was."""
        for sequence in self.waiting:
            if sequence.job is job and not job.preemptions:
                self.waiting.remove(sequence)
                return True
        return False

    def advance(self, now: float) -> list[Job]:
        """End the steps under way at `busy_until`, which is `now`, and begin the next.

        Returns:
            The jobs that ended.
        """
        assert now == self.busy_until, f"advanced at {now}, busy until {self.busy_until}"
        if self._stretch:
            self._apply(self._stretch, now)
        else:
            self._end_mixed(now)
        self._grown = 0
        ended: list[Sequence] = []
        while self._ends and self._ends[0][0] <= self._step:
            sequence = heapq.heappop(self._ends)[2]
            if sequence.place == "decoding" and sequence.last_step == self._step and sequence not in ended:
                ended.append(sequence)
        for sequence in ended:
            self._end(sequence, now)
        self._begin(now)
        return [sequence.job for sequence in ended]

    def settle(self, now: float) -> None:
        """Bring the accounts up to the last step that ended by `now`."""
        if self._stretch > 1:
            done = self._done_by(now)
            if 0 < done < self._stretch:
                self._apply(done, self._end_of(done))
                self._stretch -= done
        self._measure(now)

    def check_integrity(self) -> None:
        """Raise AssertionError when the block accounts don't add up."""
        used = self._cached_in_use() * self._per_granule
        used += sum(self.held_blocks(s) - len(s.refs) * self._per_granule for s in self.sequences())
        assert used == self.used_blocks, f"{self.used_blocks} blocks in use, summed {used}"
        assert 0 <= self.free_blocks <= self.spec.capacity_blocks
        assert self._lengths == sum(s.origin + self._step for s in self.decoding.values())

    # Steps

    def _begin(self, now: float) -> None:
        """Begin the next step, or a stretch of them."""
        self._started_at, self._stretch, self._chunks = now, 0, []
        if self.decoding:
            self._grow_next()
        self._chunks = self._plan_prefill()
        self.cache.shrink(self.free_blocks // self._per_granule)
        if self._chunks:
            self.busy_until = now + self._mixed_time()
        elif self.decoding:
            self._stretch = self._longest_stretch()
            self.busy_until = self._end_of(self._stretch)
        else:
            assert not self.waiting, "an idle replica refuses a sequence that fits it"
            self.busy_until = None

    def _plan_prefill(self) -> list[tuple[Sequence, int]]:
        if not self.prefilling and not self.waiting:
            return []
        budget = prefill_budget(
            decodes=len(self.decoding),
            kv_tokens=self._lengths,
            decoding=len(self.decoding),
            prefilling=len(self.prefilling) + self._fitting(),
            max_batch_tokens=self.spec.max_batch_tokens,
            chunks=self._beside,
        )
        chunks: list[tuple[Sequence, int]] = []
        candidates = deque(self.prefilling)
        while budget > 0:
            if not candidates:
                admitted = self._admit()
                if admitted is None:
                    break
                candidates.append(admitted)
            sequence = candidates.popleft()
            tokens = min(budget, sequence.remaining)
            chunks.append((sequence, tokens))
            budget -= tokens
        return chunks

    def _fitting(self) -> int:
        free, fit = self.free_blocks, 0
        for sequence in self.waiting:
            free -= self._blocks(sequence.job.prompt + sequence.produced)
            if free < 0 or self.running + fit >= self.spec.max_sequences:
                break
            fit += 1
        return fit

    def _admit(self) -> Sequence | None:
        if not self.waiting or self.running >= self.spec.max_sequences:
            return None
        sequence = self.waiting[0]
        length = sequence.job.prompt + sequence.produced
        shareable = sequence.job.granules[: (length - 1) // GRANULE]
        matched = shareable[: self.cache.match(shareable)]
        new = self._blocks(length) - len(matched) * self._per_granule
        taken = new + self.cache.idle_among(matched) * self._per_granule
        if taken + (1 if self.running else 0) > self.free_blocks:
            return None
        self.cache.use(matched)
        self._take(taken)
        sequence.refs = list(matched)
        sequence.prefilled = length
        sequence.remaining = length - len(matched) * GRANULE
        if not sequence.produced:
            sequence.job.cached = len(matched) * GRANULE
        sequence.place = "prefilling"
        self.prefilling.append(self.waiting.popleft())
        return sequence

    def _mixed_time(self) -> float:
        tokens = len(self.decoding) + sum(chunk for _, chunk in self._chunks)
        context = self._lengths + sum(s.prefilled - s.remaining for s, _ in self._chunks)
        return self.spec.speed.step(tokens, len(self.decoding) + len(self._chunks), context)

    def _end_mixed(self, now: float) -> None:
        self._measure(now)
        if self.decoding:
            self.gaps.add(now - self._started_at, len(self.decoding))
        self._step += 1
        self._grown = 0
        self._lengths += len(self.decoding)
        for sequence, tokens in self._chunks:
            sequence.remaining -= tokens
            if sequence.remaining == 0:
                self._first_token(sequence, now)

    def _first_token(self, sequence: Sequence, now: float) -> None:
        """Its prompt is computed, which draws one token; from the next step on it decodes."""
        job = sequence.job
        self.prefilling.remove(sequence)
        if sequence.produced:
            self.gaps.add(now - sequence.last_token_at, 1)
        else:
            job.first_token_at = now
        sequence.produced += 1
        sequence.place = "decoding"
        # Its table covers `prefilled` tokens, one less than its length, until the next step takes a block if need be.
        sequence.origin = sequence.prefilled - self._step
        sequence.last_step = self._step + job.output - sequence.produced
        self.decoding[sequence.order] = sequence
        self._lengths += sequence.prefilled
        self._growing[(self._step - sequence.prefilled) % self.spec.block_size].add(sequence.order)
        heapq.heappush(self._ends, (sequence.last_step, next(self._pushed), sequence))
        for granule in job.granules[len(sequence.refs) : job.prompt // GRANULE]:
            if self.cache.add(granule):
                sequence.refs.append(granule)

    def _end(self, sequence: Sequence, now: float) -> None:
        job = sequence.job
        job.ended_at = now
        self._release(sequence)
        full = (job.prompt + job.output - 1) // GRANULE
        self.cache.add_idle(job.granules[:full])

    # Blocks

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.spec.block_size)

    def _take(self, blocks: int) -> None:
        self.free_blocks -= blocks
        if self.cache.idle:
            self.cache.shrink(self.free_blocks // self._per_granule)

    def _grow_next(self) -> None:
        """Blocks for the next step's decodes; preempts the youngest sequences while there are too few."""
        bucket = self._growing[self._step % self.spec.block_size]
        while bucket and len(bucket) > self.free_blocks:
            self._preempt(max(self.sequences(), key=lambda s: s.order))
        self._take(len(bucket))
        self._grown = 1

    def _preempt(self, sequence: Sequence) -> None:
        sequence.job.preemptions += 1
        self.preemptions += 1
        if sequence.place == "decoding":
            sequence.produced = sequence.job.output - (sequence.last_step - self._step)
            sequence.last_token_at = self._started_at
        self._release(sequence)
        sequence.place = "waiting"
        self.waiting.appendleft(sequence)

    def _release(self, sequence: Sequence) -> None:
        own = self.held_blocks(sequence) - len(sequence.refs) * self._per_granule
        if sequence.place == "decoding":
            del self.decoding[sequence.order]
            self._growing[-sequence.origin % self.spec.block_size].discard(sequence.order)
            self._lengths -= sequence.origin + self._step
        else:
            self.prefilling.remove(sequence)
        self.free_blocks += own + self.cache.leave(sequence.refs) * self._per_granule
        sequence.refs = []
        sequence.place = "ended"

    def _cached_in_use(self) -> int:
        return len(self.cache.known()[0])

    # Stretches

    def _longest_stretch(self) -> int:
        """Steps until a sequence ends or blocks might run out."""
        while self._ends[0][2].place != "decoding" or self._ends[0][2].last_step != self._ends[0][0]:
            heapq.heappop(self._ends)
        to_end = self._ends[0][0] - self._step
        rounds = self.free_blocks // len(self.decoding)
        return max(1, min(to_end, rounds * self.spec.block_size))

    def _first_and_slope(self) -> tuple[float, float]:
        count = len(self.decoding)
        return self.spec.speed.step(count, count, self._lengths), self.spec.speed.per_kv_token * count

    def _end_of(self, steps: int) -> float:
        first, slope = self._first_and_slope()
        return self._started_at + steps * first + slope * steps * (steps - 1) / 2

    def _done_by(self, now: float) -> int:
        """Steps of the stretch that ended by `now`."""
        low, high = 0, self._stretch
        while low < high:
            middle = (low + high + 1) // 2
            if self._end_of(middle) <= now:
                low = middle
            else:
                high = middle - 1
        return low

    def _cut(self, now: float) -> None:
        """End the stretch after the step that runs at `now`."""
        self._stretch = min(self._stretch, self._done_by(now) + 1)
        self.busy_until = self._end_of(self._stretch)

    def _apply(self, steps: int, end: float) -> None:
        """Account for the first so many steps of the stretch; `_begin` has taken the blocks of its very first."""
        decoding, before = len(self.decoding), self.used_blocks
        self.gaps.add((end - self._started_at) / steps, decoding * steps)
        # The first step's blocks were taken at its begin; when a part of the stretch is left, its next step's are too.
        more = steps - 1 + (steps < self._stretch)
        whole, rest = divmod(more, self.spec.block_size)
        growing = (self._growing[(self._step + 1 + i) % self.spec.block_size] for i in range(rest))
        self._take(whole * decoding + sum(map(len, growing)))
        self._step += steps
        self._lengths += decoding * steps
        self.used_area += (before + self.used_blocks) / 2 * max(0.0, end - self._measured_at)
        self._measured_at = max(self._measured_at, end)
        self._started_at = end

    def _measure(self, now: float) -> None:
        if now > self._measured_at:
            self.used_area += self.used_blocks * (now - self._measured_at)
            self._measured_at = now
