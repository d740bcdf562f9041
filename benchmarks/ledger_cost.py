"""What the ledger costs: `python -m benchmarks.ledger_cost`, and with `--ray` through Ray Serve too.

In process, a pair is one request reserved and its grant released again. With requests waiting, a pair is one grant
released, the waiting requests that this makes room for granted, and one new request joining those who wait: the number
that waits stays the same, and so does the cost of a decision if nothing is scanned. The seconds are this process's own
CPU time, which is what the ledger's one thread has: on an idle machine they are those of the clock.

Through Ray, one actor asks the ledger's deployment at a steady rate, as an ingress does; what it measures is what every
request waits before it is sent to a replica. It plays the replicas too: each reports every 100 ms which of its requests
have ended, all at once, and so its grants end as those of a service do.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import random
import tempfile
from collections import defaultdict, deque
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter, process_time
from typing import Any

from benchmarks.child import ROOT
from deployments.protocol import Grant, ReplicaState, ReserveRequest
from deployments.routing.ledger import Ledger, Queued
from deployments.routing.refusals import LedgerConfig

PAIRS_GOAL, ADDED_GOAL_MS = 20_000, 3.0
BLOCK, BLOCKS, TENANTS = 16, 512, 100
EPOCH = 1
REPORT_S = 0.1

Ended = tuple[str, int, int]
"""(grant id, prompt tokens, output tokens)"""


def replica(index: int, ledger_epoch: int = EPOCH, sequence: int = 1, ended: Sequence[Ended] = ()) -> ReplicaState:
    """The report of an empty replica of 8,192 tokens, on which these grants have ended."""
    shape = BLOCK, BLOCKS, BLOCK * BLOCKS
    return ReplicaState(f"r{index}", "default", 1, sequence, *shape, ended=tuple(ended), ledger_epoch=ledger_epoch)


def request(rng: random.Random, number: int) -> ReserveRequest:
    """A request of 64 to 2,304 tokens, of one of a hundred tenants."""
    prompt = rng.choice((64, 128, 256, 512, 1024, 2048))
    output = rng.choice((16, 64, 256))
    return ReserveRequest(f"q{number}", "in", prompt, output, 1e9, tenant=f"t{rng.randrange(TENANTS)}")


class Bench:
    """One ledger, what has been granted of it, and how many wait.

    Args:
        replicas: how many it has.
        waiting: how many requests wait all the time; 0 leaves it nearly empty.
    """

    def __init__(self, replicas: int, waiting: int) -> None:
        self._rng = random.Random(0)
        config = LedgerConfig("m", expected_replicas=replicas, queue_limit=waiting + 1)
        self.ledger = Ledger(config, epoch=EPOCH, now=0.0, rng=random.Random(0))
        for index in range(replicas):
            self.ledger.report(replica(index), 0.0)
        self._grants: deque[Grant] = deque()
        self._target, self.waiting, self.asked, self.released = waiting, 0, 0, 0
        while self.waiting < waiting:
            self._ask()

    def run(self, pairs: int) -> float:
        """Reserve and release so many times each; returns pairs a second of CPU time."""
        asked, released, begun = self.asked, self.released, process_time()
        while self.asked + self.released < asked + released + 2 * pairs:
            self._turn()
        return (self.asked + self.released - asked - released) / 2 / (process_time() - begun)

    def _turn(self) -> None:
        if self._target == 0:
            self._ask()
        self.ledger.release(self._grants.popleft().grant_id, 0.0)
        self.released += 1
        granted = [outcome for outcome in self.ledger.admit(0.0) if isinstance(outcome, Grant)]
        self._grants.extend(granted)
        self.waiting -= len(granted)
        while self.waiting < self._target:
            self._ask()

    def _ask(self) -> None:
        self.asked += 1
        outcome = self.ledger.reserve(request(self._rng, self.asked), 0.0)
        if isinstance(outcome, Grant):
            self._grants.append(outcome)
        elif isinstance(outcome, Queued):
            self.waiting += 1
        else:
            raise RuntimeError(f"the benchmark's own request was refused: {outcome.message}")


class Asker:
    """A Serve deployment that asks a ledger as an ingress does, and plays the replicas too."""

    def __init__(self, ledger: Any) -> None:
        self._ledger = ledger
        self._ended: dict[str, list[Ended]] = defaultdict(list)
        """Replica -> grants to report as ended."""
        self._outputs = random.Random(1)

    async def measure(self, replicas: int, rate: int, seconds: int) -> list[float]:
        """Reserve at a steady rate, whatever the answers take; returns the seconds that each took.

        Raises:
            ExceptionGroup: of what a call of the ledger raised.
        """
        epoch = (await self._ledger.report.remote(replica(0, 0))).epoch
        for sequence in (2, 3):
            for index in range(replicas):
                await self._ledger.report.remote(replica(index, epoch, sequence))
        loop, rng = asyncio.get_running_loop(), random.Random(0)
        begun, calls = loop.time(), []
        async with asyncio.TaskGroup() as group:
            beats = [group.create_task(self._beat(index, epoch)) for index in range(replicas)]
            for number in range(rate * seconds):
                await asyncio.sleep(max(0.0, begun + number / rate - loop.time()))
                calls.append(group.create_task(self._ask(request(rng, number))))
            took = await asyncio.gather(*calls)
            for beat in beats:
                beat.cancel()
        return took[rate:]  # without the first second

    async def _ask(self, wish: ReserveRequest) -> float:
        begun = perf_counter()
        grant = await self._ledger.reserve.remote(wish)
        took = perf_counter() - begun
        if not isinstance(grant, Grant):
            raise RuntimeError(f"the benchmark's own request was refused: {grant.message}")
        output = self._outputs.randint(1, wish.max_tokens)
        self._ended[grant.replica_id].append((grant.grant_id, wish.prompt_tokens, output))
        return took

    async def _beat(self, index: int, epoch: int) -> None:
        """The reports of one replica; not at the same time as the others'."""
        await asyncio.sleep(REPORT_S * random.random())
        for sequence in count(4):
            ended = self._ended.pop(f"r{index}", [])
            await self._ledger.report.remote(replica(index, epoch, sequence, ended))
            await asyncio.sleep(REPORT_S)


def through_ray(replicas: int, rate: int, seconds: int) -> list[float]:
    """Milliseconds that reserves took through Ray Serve, in order of size, on a Ray of our own."""
    from deployments.local_ray import LocalRay

    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as home:
        local = LocalRay(Path(home), cpus=2)
        local.start()
        try:
            from ray import serve

            from deployments.routing.ledger_deployment import ledger_application

            ledger = ledger_application(LedgerConfig("m", expected_replicas=replicas))
            asker = serve.deployment(name="asker", ray_actor_options={"num_cpus": 0.01})(Asker).bind(ledger)
            handle = serve.run(asker, name="cost", route_prefix=None)

            async def measured() -> list[float]:  # handles need an event loop, as our Ray sets Serve up
                took: list[float] = await handle.measure.remote(replicas, rate, seconds)
                return took

            took = asyncio.run(asyncio.wait_for(measured(), seconds + 300))
        finally:
            local.stop()
    return sorted(1000 * each for each in took)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20_000, help="of each case and repeat")
    parser.add_argument("--repeats", type=int, default=3, help="of which the fastest is printed")
    parser.add_argument("--ray", action="store_true", help="measure through Ray Serve too")
    parser.add_argument("--rate", type=int, default=100, help="requests a second through Ray")
    parser.add_argument("--seconds", type=int, default=20, help="of requests through Ray")
    options = parser.parse_args(arguments)
    print(f"Python {platform.python_version()}, {os.cpu_count()} cores; goal {PAIRS_GOAL:,} pairs/s")
    for replicas, waiting in ((8, 0), (1000, 0), (8, 1000), (8, 10_000), (1000, 1000), (1000, 10_000)):
        bench = Bench(replicas, waiting)
        best = max(bench.run(options.pairs) for _ in range(options.repeats))
        bench.ledger.check_integrity()
        print(f"replicas={replicas} waiting={waiting}: {best:,.0f} pairs/s")
    if options.ray:
        took = through_ray(8, options.rate, options.seconds)
        middle, late = median(took), quantiles(took, n=100)[98]
        print(
            f"through Ray at {options.rate} requests/s: p50 {middle:.2f} ms, p99 {late:.2f} ms "
            f"(goal: p50 at most {ADDED_GOAL_MS:g} ms)"
        )


if __name__ == "__main__":
    main()
