from __future__ import annotations

import math

import pytest

from benchmarks.live.clients import Served
from benchmarks.live.fleet import CONTEXT, FLEET
from benchmarks.live.observer import Account
from benchmarks.routing.front import Limits
from benchmarks.routing.workload import LONGEST_PROMPT, MAX_TOKENS
from benchmarks.routing_live import Run, Workload, simulate, table

ACCOUNT = Account.of([])


def test_times_are_simulated_seconds_and_the_warm_up_is_left_out() -> None:
    warm_up = [Served(800.0, 900.0, refused=False)] * 2
    run = Run.live([*warm_up, *(Served(8.0, 16.0, refused=False) for _ in range(8))], preemptions=4, slow=8.0)
    assert (run.requests, run.refused, run.preemptions) == (8, 0, 4)
    assert (run.ttft.p50, run.end_to_end.p99) == (1.0, 2.0)


def test_a_refused_request_has_no_end() -> None:
    served = [Served(8.0, 16.0, refused=False)] * 2 + [Served(math.inf, math.inf, refused=True)] * 8
    run = Run.live(served, preemptions=0, slow=8.0)
    assert run.refused == 8
    assert run.ttft.p50 == math.inf


def test_every_request_fits_every_replica() -> None:
    assert LONGEST_PROMPT + MAX_TOKENS <= CONTEXT <= min(spec.capacity_tokens for spec in FLEET)


def test_the_simulation_beside_it_has_the_same_requests_and_prefers_grants() -> None:
    workload = Workload("poisson", 400, 0.9, seed=0)
    assert workload.jobs() == workload.jobs()
    ours, theirs = simulate("grants", workload, Limits()), simulate("serve", workload, Limits())
    assert ours.ttft.p99 < theirs.ttft.p99
    assert ours.preemptions < theirs.preemptions


def test_the_table_shows_ratios_where_there_are_any() -> None:
    fast = Run.live([Served(8.0, 16.0, refused=False)] * 5, preemptions=0, slow=8.0)
    slow = Run.live([Served(32.0, 64.0, refused=False)] * 5, preemptions=10, slow=8.0)
    rows = table({"grants": (fast, ACCOUNT), "serve": (slow, ACCOUNT)}, {"grants": fast, "serve": fast}).splitlines()
    cells = {row[:24].strip(): row[24:].split() for row in rows[2:]}
    assert cells["TTFT p99, s"] == ["1", "4", "0.25", "1", "1", "1"]
    assert cells["preemptions"] == ["0", "10", "0", "0", "0", "nan"]


@pytest.mark.parametrize("arrivals", ["poisson", "bursty"])
def test_both_arrivals_come_at_the_same_mean_rate(arrivals: str) -> None:
    jobs = Workload(arrivals, 4000, 0.9, seed=1).jobs()
    other = Workload("poisson", 4000, 0.9, seed=2).jobs()
    assert jobs[-1].arrival == pytest.approx(other[-1].arrival, rel=0.25)
