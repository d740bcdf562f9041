"""The routing simulation's workload on a live service on the CPU: grants against Ray Serve's own routing.

    python -m benchmarks.routing_live                     # some 7 minutes on 2 cores
    python -m benchmarks.routing_live --requests 150 --load 0.8

Two unequal pools, two ingress replicas, HTTP through HAProxy, the service's own API, dispatcher, ledger and admission.
The replicas compute nothing: each runs the simulation's replica in real time, `--slow` times slower than the H200 that
it stands for, because the embedded model on two cores is too slow to fill a KV cache. An observer that hears the
replicas, and never the ledger, looks for over-committed ones. Beside it is what the simulation says of the same
requests on the same fleet; times are compared as ratios, of one run.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from benchmarks.child import ROOT
from benchmarks.live.clients import Served, send_all
from benchmarks.live.fleet import FLEET, MODEL, Routing, Rules
from benchmarks.live.observer import Account, Observer
from benchmarks.routing.baselines import two_choices
from benchmarks.routing.front import DirectFront, LedgerFront, Limits
from benchmarks.routing.job import Job
from benchmarks.routing.outcome import Outcome, Times
from benchmarks.routing.saturation import saturation
from benchmarks.routing.simulation import WARM_UP, Simulation
from benchmarks.routing.workload import bursty, poisson

QUEUE_PER_REPLICA = Limits().queue_per_replica
SILENT_LIMIT_S = 300.0
IDLE_LIMIT_S = 30.0
OBSERVER = "routing-live-observer"


@dataclass(frozen=True, slots=True)
class Run:
    """One routing on one workload. Seconds are simulated ones: the wall's divided by `slow`."""

    requests: int
    ttft: Times
    end_to_end: Times
    refused: int
    preemptions: int

    @classmethod
    def simulated(cls, outcome: Outcome) -> Run:
        """Of the simulation."""
        return cls(outcome.requests, outcome.ttft, outcome.end_to_end, outcome.refused, outcome.preemptions)

    @classmethod
    def live(cls, served: Sequence[Served], preemptions: int, slow: float) -> Run:
        """Of the live service, without the requests of the warm-up; preemptions are of the whole run."""
        counted = served[int(WARM_UP * len(served)) :]
        return cls(
            requests=len(counted),
            ttft=Times.of([each.ttft / slow for each in counted]),
            end_to_end=Times.of([each.end_to_end / slow for each in counted]),
            refused=sum(each.refused for each in counted),
            preemptions=preemptions,
        )


@dataclass(frozen=True, slots=True)
class Workload:
    """What all runs are given. Times in simulated seconds."""

    arrivals: str
    requests: int
    load: float
    """Arrivals as a share of what the fleet saturates at."""
    seed: int

    def jobs(self) -> list[Job]:
        """Fresh ones: a run writes into its own."""
        source = {"poisson": poisson, "bursty": bursty}[self.arrivals]
        rate = self.load * saturation(FLEET, source(10.0 * len(FLEET), self.requests, random.Random(self.seed)))
        return source(rate, self.requests, random.Random(self.seed))


def simulate(routing: Routing, workload: Workload, limits: Limits) -> Run:
    """The same requests, fleet and limits in the simulation."""
    jobs = workload.jobs()
    front = LedgerFront if routing == "grants" else partial(DirectFront, two_choices())
    outcome = Simulation(FLEET, jobs, front, limits, workload.seed).run()
    return replace(Run.simulated(outcome), preemptions=sum(job.preemptions for job in jobs))


def serve_live(routing: Routing, workload: Workload, limits: Limits, slow: float, url: str) -> tuple[Run, Account]:
    """Deploy, send everything, read what the observer saw, delete. On a Ray that runs, with Serve started."""
    import ray
    from ray import serve

    from benchmarks.live.service import build
    from benchmarks.server import wait_until_ready

    name = f"{OBSERVER}-{routing}"
    observer = ray.remote(num_cpus=0)(Observer).options(name=name, namespace="headroom").remote()
    rules = Rules(slow, QUEUE_PER_REPLICA * len(FLEET), limits.wait_limit * slow)
    serve.run(build(routing, rules, name), name=routing, route_prefix="/")
    wait_until_ready(url)
    served = asyncio.run(send_all(url, MODEL, workload.jobs(), slow, SILENT_LIMIT_S))
    deadline = time.monotonic() + IDLE_LIMIT_S
    while not ray.get(observer.idle.remote(len(FLEET))):
        if time.monotonic() > deadline:
            raise RuntimeError(f"the replicas still hold or promise blocks {IDLE_LIMIT_S:g} s after the last answer")
        time.sleep(0.2)
    account: Account = ray.get(observer.account.remote())
    serve.delete(routing)
    ray.kill(observer)
    return Run.live(served, account.preemptions, slow), account


def measure(workload: Workload, limits: Limits, slow: float) -> dict[Routing, tuple[Run, Account]]:
    """Both routings, one after the other, on one Ray of our own."""
    from benchmarks.server import free_port
    from deployments.home import state_folder
    from deployments.local_ray import LocalRay

    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    local = LocalRay(state_folder(), cpus=os.cpu_count() or 1)
    local.start()
    try:
        from ray import serve

        port = free_port()
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        url = f"http://127.0.0.1:{port}"
        routings: tuple[Routing, ...] = ("grants", "serve")
        return {routing: serve_live(routing, workload, limits, slow, url) for routing in routings}
    finally:
        local.stop()


def table(live: dict[Routing, tuple[Run, Account]], simulated: dict[Routing, Run]) -> str:
    """Both routings live and simulated, and grants over Serve's in both."""
    columns = [live["grants"][0], live["serve"][0], simulated["grants"], simulated["serve"]]
    lines = [f"{'':24}{'live':>27}{'':9}{'simulated':>18}", f"{'':24}" + f"{'grants':>9}{'serve':>9}{'ratio':>9}" * 2]
    for title, read in ROWS:
        ours, theirs, sim_ours, sim_theirs = (read(run) for run in columns)
        cells = (ours, theirs, _ratio(ours, theirs), sim_ours, sim_theirs, _ratio(sim_ours, sim_theirs))
        lines.append(f"{title:24}" + "".join(f"{cell:9.3g}" for cell in cells))
    return "\n".join(lines)


ROWS: list[tuple[str, Callable[[Run], float]]] = [
    ("TTFT p50, s", lambda run: run.ttft.p50),
    ("TTFT p99, s", lambda run: run.ttft.p99),
    ("end to end p50, s", lambda run: run.end_to_end.p50),
    ("end to end p99, s", lambda run: run.end_to_end.p99),
    ("refused", lambda run: run.refused),
    ("preemptions", lambda run: run.preemptions),
]


def _ratio(ours: float, theirs: float) -> float:
    if theirs in (0, math.inf) or ours == math.inf:
        return math.nan
    return ours / theirs


def observed(routing: Routing, account: Account) -> str:
    """What the observer saw, in a line."""
    return (
        f"{routing}: {account.taken_up} requests taken up by {account.replicas} replicas, {account.over_at_take_up} by "
        f"one that was over-committed then (by {account.most_over} blocks at most); {account.samples} samples: granted "
        f"over capacity in {account.granted_over}, granted and held together in {account.over_at_samples}, held in "
        f"{account.held_over}; at most {account.peak_share:.0%} of a replica's blocks promised"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 1 when a grant over-committed a replica."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arrivals", choices=("poisson", "bursty"), default="poisson")
    parser.add_argument("--requests", type=int, default=400, help="of each run; the first fifth is not counted")
    parser.add_argument("--load", type=float, default=0.9, help="share of what the fleet saturates at")
    parser.add_argument("--slow", type=float, default=8.0, help="wall-clock seconds of one simulated second")
    parser.add_argument("--seed", type=int, default=0, help="of arrivals and lengths")
    chosen = parser.parse_args(arguments)
    slow = chosen.slow
    limits = replace(
        Limits(), report_delay=0.02 / slow, report_every=0.1 / slow, heartbeat=1 / slow, ledger_call=0.01 / slow
    )
    workload = Workload(chosen.arrivals, chosen.requests, chosen.load, chosen.seed)
    routings: tuple[Routing, ...] = ("grants", "serve")
    simulated = {routing: simulate(routing, workload, limits) for routing in routings}
    span = workload.jobs()[-1].arrival * slow
    print(
        f"{chosen.requests} requests, {chosen.arrivals}, over {span:.0f} s, at {chosen.load:g} of saturation",
        flush=True,
    )
    live = measure(workload, limits, slow)
    print(table(live, simulated))
    print("Times are simulated seconds; live ones are wall-clock seconds divided by", f"{slow:g}.")
    for routing, (_, account) in live.items():
        print(observed(routing, account))
    ours = live["grants"][1]
    return int(bool(ours.over_at_take_up or ours.granted_over or ours.held_over))


if __name__ == "__main__":
    sys.exit(main())
