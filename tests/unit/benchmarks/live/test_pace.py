from __future__ import annotations

import random

from benchmarks.live.pace import Pace
from benchmarks.routing.fleet import ReplicaSpec
from benchmarks.routing.job import Job

SPEC = ReplicaSpec(capacity_tokens=512)


def test_it_is_where_the_simulation_is_however_often_it_is_looked_at() -> None:
    rng = random.Random(1)
    sizes = [(rng.randint(1, 200), rng.randint(1, 100)) for _ in range(30)]

    def run(pause: float) -> tuple[list[tuple[int, float, float]], int]:
        pace, jobs, now = Pace(SPEC), [Job(i, 0.1 * i, *size, 100) for i, size in enumerate(sizes)], 0.0
        left, ended = list(jobs), []
        while len(ended) < len(jobs):
            now = min(now + pause, left[0].arrival if left else now + pause)
            ended += pace.catch_up(now)
            while left and left[0].arrival <= now:
                pace.submit(left.pop(0), now)
            pace.check_integrity()
        return [(job.index, round(job.first_token_at, 9), round(job.ended_at, 9)) for job in ended], pace.preemptions

    assert run(0.003) == run(0.5)
    assert run(0.5)[1] > 0, "the load is too light to preempt anything"


def test_progress_counts_tokens_and_blocks_of_all_that_have_not_ended() -> None:
    pace = Pace(SPEC)
    first, second = Job(0, 0.0, 100, 50, 100), Job(1, 0.0, 480, 8, 100)
    pace.submit(first, 0.0)
    pace.submit(second, 0.0)
    seen = []
    now = 0.0
    while pace.progress():
        now += 0.001
        pace.catch_up(now)
        seen.append(pace.progress())
        assert pace.used_blocks == sum(held for _, held in seen[-1].values()) <= SPEC.capacity_blocks
    produced = [each[0][0] for each in seen if 0 in each]
    assert produced == sorted(produced)
    assert set(produced) == set(range(50)), "each token is seen, one a step"
    assert all(each[1] == (0, 0) for each in seen if 0 in each), "the second waits for the first one's blocks"
    assert seen[-1] == {}


def test_what_waits_can_be_withdrawn_and_what_runs_not() -> None:
    pace = Pace(SPEC)
    runs, waits = Job(0, 0.0, 400, 50, 100), Job(1, 0.0, 400, 50, 100)
    for job in (runs, waits):
        pace.submit(job, 0.0)
    assert pace.waiting == 1
    assert pace.withdraw(waits)
    assert not pace.withdraw(runs)
    assert list(pace.progress()) == [0]
