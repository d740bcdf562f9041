"""The simulation accounts for every request and every block, repeats by seed, and times steps as its formula says."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from benchmarks.routing.clairvoyant import REFERENCES, ClairvoyantFront
from benchmarks.routing.fleet import ReplicaSpec
from benchmarks.routing.front import Limits
from benchmarks.routing.histogram import Histogram
from benchmarks.routing.job import Job
from benchmarks.routing.outcome import Interval
from benchmarks.routing.replica import SimReplica
from benchmarks.routing.saturation import saturation
from benchmarks.routing.simulation import Simulation
from benchmarks.routing.speed import Speed
from benchmarks.routing.study import OURS, POLICIES, front_of
from benchmarks.routing.workload import Workload, bursty, chats, poisson

SMALL = (ReplicaSpec(16_384), ReplicaSpec(32_768))
EVERY = (*POLICIES, *REFERENCES)


def simulated(
    policy: str, jobs: list[Job], fleet: Sequence[ReplicaSpec] = SMALL, limits: Limits | None = None
) -> Simulation:
    simulation = Simulation(fleet, jobs, front_of(policy), limits or Limits(), seed=3)
    simulation.run()
    return simulation


@pytest.mark.parametrize("workload", [poisson, bursty, chats])
@pytest.mark.parametrize("policy", EVERY)
def test_every_request_ends_or_is_refused_and_every_block_is_free_again(policy: str, workload: Workload) -> None:
    jobs = workload(60.0, 300, random.Random(1))
    simulation = simulated(policy, jobs, limits=Limits(queue_per_replica=4))
    ended = [job for job in jobs if math.isfinite(job.ended_at)]
    assert len(ended) + sum(job.refused for job in jobs) == len(jobs)
    assert not any(job.refused for job in ended)
    assert any(job.refused for job in jobs), "the load is meant to be too much"
    for job in ended:
        assert job.arrival < job.first_token_at <= job.ended_at
    for replica in simulation.replicas:
        replica.check_integrity()
        assert replica.ongoing == replica.used_blocks == 0


@pytest.mark.parametrize("policy", EVERY)
def test_with_room_for_all_the_first_token_takes_as_long_as_its_prompt(policy: str) -> None:
    alone = [Job(i, 100.0 * i, prompt, 5, 1024) for i, prompt in enumerate((1, 17, 900, 2048))]
    simulated(policy, alone, fleet=[ReplicaSpec(1 << 20)] * 3)
    speed = Speed()
    call = Limits().ledger_call if policy == OURS else 0.0
    for job in alone:
        assert job.ttft == pytest.approx(call + speed.step(job.prompt, 1, 0))
        decodes = sum(speed.step(1, 1, job.prompt + done) for done in range(4))
        assert job.end_to_end == pytest.approx(job.ttft + decodes)


@pytest.mark.parametrize("policy", EVERY)
def test_the_same_seed_gives_the_same_run(policy: str) -> None:
    def once() -> list[tuple[float, float]]:
        jobs = chats(20.0, 200, random.Random(5))
        simulated(policy, jobs)
        return [(job.ttft, job.end_to_end) for job in jobs]

    assert once() == once()


def test_who_knows_the_future_fills_replicas_and_preempts_hardly_anyone() -> None:
    seen = {}
    knowing = [policy for policy, reference in REFERENCES.items() if reference.guess_percent is None]
    for policy in ("least requests", *knowing):
        jobs = poisson(60.0, 600, random.Random(1))
        seen[policy] = simulated(policy, jobs, limits=Limits(queue_per_replica=1000, wait_limit=1e9))
    preempted = {policy: sum(job.preemptions for job in run.jobs) for policy, run in seen.items()}
    last = {policy: max(job.ended_at for job in run.jobs) for policy, run in seen.items()}
    for policy in knowing:
        assert preempted[policy] < 0.01 * len(jobs) < preempted["least requests"]
        assert last[policy] < last["least requests"]


def test_a_replica_that_runs_out_of_blocks_preempts_the_youngest_and_recomputes_it() -> None:
    # 8 blocks of 16: both prompts take 3, and each sequence needs 6 at its end.
    gaps = Histogram()
    replica = SimReplica(ReplicaSpec(128), gaps)
    old, young = Job(0, 0.0, 48, 48, 48), Job(1, 0.0, 48, 48, 48)
    replica.submit(old, 0.0)
    replica.submit(young, 0.0)
    while replica.busy_until is not None:
        replica.advance(replica.busy_until)
        replica.check_integrity()
    assert (old.preemptions, young.preemptions, replica.preemptions) == (0, 1, 1)
    assert old.ended_at < young.ended_at
    assert gaps.count == 2 * 47, "each token but the first has a gap before it, however often it was recomputed"


def test_stretches_of_steps_are_what_single_steps_are() -> None:
    def run(look_every: float | None) -> tuple[float, float]:
        replica = SimReplica(ReplicaSpec(4096), Histogram())
        job = Job(0, 0.0, 100, 300, 1024)
        replica.submit(job, 0.0)
        looked = 0.0
        while (end := replica.busy_until) is not None:
            while look_every is not None and (looked := looked + look_every) < end:
                replica.settle(looked)
                replica.check_integrity()
            replica.advance(end)
        return job.ended_at, replica.used_area

    (end, area), (end_looked, area_looked) = run(None), run(0.05)
    assert end_looked == pytest.approx(end)
    assert area_looked == pytest.approx(area, rel=0.02)  # a stretch counts its blocks as growing evenly


def test_a_shared_prefix_is_computed_once_and_held_once() -> None:
    replica = SimReplica(ReplicaSpec(4096), Histogram())
    first, second = (Job(i, 0.0, 130, 40, 64, granules=(1, 2)) for i in range(2))
    replica.submit(first, 0.0)
    assert replica.busy_until is not None
    replica.advance(replica.busy_until)
    replica.submit(second, 0.01)
    while replica.busy_until is not None and second.first_token_at == math.inf:
        replica.advance(replica.busy_until)
        replica.check_integrity()
    assert (first.cached, second.cached) == (0, 128)
    assert replica.shared_blocks == 128 // 16


def test_saturation_is_the_sum_of_the_replicas() -> None:
    jobs = poisson(10.0, 300, random.Random(2))
    one, other = saturation(SMALL[:1], jobs), saturation(SMALL[1:], jobs)
    assert saturation(SMALL, jobs) == pytest.approx(one + other)
    assert other > one > 0


def test_an_interval_drops_the_extremes_of_ten() -> None:
    assert Interval.of([float(i) for i in range(10)]) == Interval(4.5, 1.0, 8.0)
    assert Interval.of([1.0, math.inf, 2.0]) == Interval(2.0, 1.0, math.inf)


def test_a_histogram_has_the_exact_mean_and_percentiles_to_a_bin() -> None:
    histogram = Histogram()
    histogram.add(0.01, 98)
    histogram.add(1.0, 2)
    assert histogram.mean == pytest.approx(0.0298)
    assert histogram.percentile(50) == pytest.approx(0.01, rel=0.02)
    assert histogram.percentile(99) == pytest.approx(1.0, rel=0.02)


class Noted:
    """Actions that are only noted."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, int]] = []
        self.refused: list[int] = []

    def send(self, job: Job, replica: int) -> None:
        self.sent.append((job.index, replica))

    def refuse(self, job: Job) -> None:
        self.refused.append(job.index)


def test_who_knows_the_future_sends_nothing_that_a_replica_would_not_take() -> None:
    """A request is held by its `max_tokens`, on a replica that is busy as on an idle one."""
    replicas = [SimReplica(ReplicaSpec(tokens), Histogram()) for tokens in (1024, 2304)]
    replicas[0].submit(Job(0, 0.0, 64, 500, 500), 0.0)
    replicas[1].submit(Job(1, 0.0, 2200, 100, 100), 0.0)
    actions = Noted()
    front = ClairvoyantFront(REFERENCES["clairvoyant"], replicas, actions, Limits(), random.Random(0))
    front.arrive(Job(2, 0.0, 100, 10, 2000), 0.0)
    assert (actions.sent, actions.refused) == ([], [])
    front.arrive(Job(3, 0.0, 100, 10, 20), 0.0)
    assert (actions.sent, actions.refused) == ([(3, 0)], [])


def test_a_replica_finds_its_chunks_as_an_engine_of_its_speed_does() -> None:
    spec = ReplicaSpec(16_384)
    assert [spec.chunks.beside(decodes, 0) for decodes in (64, 224)] == [384, 864]
    assert spec.chunks.beside(64, 16_000) == 448, "0.7 ms of KV are 1 ms more, and 40 rows"
    assert replace(spec, prefill_chunk_tokens=512).chunks.beside(64, 16_000) == 512
