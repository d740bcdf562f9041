"""Hours in small: a service at 1.2 times its capacity, with clients that leave, and what that does to its memory.

    python -m benchmarks.soak                   # 20 minutes
    python -m benchmarks.soak --minutes 5

It serves the embedded model with two ingress replicas and two replicas. First as many clients as keep it busy measure
what it serves a second; then requests come at 1.2 times that rate, and a quarter as many beside them leave at a random
moment. Every two seconds it reads the processes' resident memory and the service's metrics page. It fails when a
request ends in any way but a full answer, a refusal with 429, or its client's leaving; when more wait than
`queue_limit`; when a block is held or granted once all have ended; when a process was replaced by another; or when the
memory of a role still grows by more than `--growth` of itself in the second half.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import yaml
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.child import ROOT
from benchmarks.live.memory import Resident, Trend, resident, trend

POOL = {"quantization": "nf4", "max_memory": {0: "280MB"}}
"""So little that requests wait for blocks."""
MODEL, QUEUE_LIMIT = "smol", 32
OVERLOAD, LEAVERS = 1.2, 0.25
BUSY_CLIENTS, CALIBRATE_S, LEAST_SERVED, CALIBRATE_LIMIT_S = 48, 40.0, 60, 600.0
SAMPLE_S, IDLE_LIMIT_S, START_LIMIT_S = 2.0, 60.0, 300.0
PROMPTS, OUTPUTS = (8, 40), (8, 48)
"""Lengths in words and tokens, uniformly drawn."""
MEAN_STAY_S = 3.0
GAUGES = ("headroom_queue_requests", "headroom_kv_blocks_held", "headroom_kv_blocks_granted")


@dataclass(frozen=True, slots=True)
class Sample:
    """One look at the service; sums over models and replicas."""

    seconds: float
    processes: tuple[Resident, ...]
    waiting: float
    held: float
    granted: float

    @property
    def memory(self) -> dict[str, int]:
        """Resident bytes by role."""
        sums: Counter[str] = Counter()
        for process in self.processes:
            sums[process.role] += process.bytes
        return dict(sums)


@dataclass(slots=True)
class Soak:
    """What happened so far."""

    outcomes: Counter[str] = field(default_factory=Counter)
    samples: list[Sample] = field(default_factory=list)

    def faults(self, most_growth: float) -> list[str]:
        """What must not be; empty when all is well."""
        last, found = self.samples[-1], []
        wrong = {kind: n for kind, n in self.outcomes.items() if kind not in ("served", "refused", "left")}
        if wrong:
            found.append(f"requests ended otherwise: {wrong}")
        if (most := max(sample.waiting for sample in self.samples)) > QUEUE_LIMIT:
            found.append(f"{most:g} requests waited, and queue_limit is {QUEUE_LIMIT}")
        if most == 0:
            found.append("no request was ever seen to wait: the service was not over its capacity")
        if last.waiting or last.held or last.granted:
            found.append(f"after all ended: {last.waiting:g} wait, {last.held:g} blocks held, {last.granted:g} granted")
        first, there = ({(p.role, p.pid) for p in sample.processes} for sample in (self.samples[0], last))
        if replaced := {role for role, _ in first ^ there}:
            found.append(f"processes came or went, so that memory tells nothing: {', '.join(sorted(replaced))}")
        for role, its in self.trends().items():
            if its.growth > most_growth:
                found.append(f"{role} grew by {its.growth:.1%} in the second half, over {most_growth:.1%}")
        return found

    def trends(self) -> dict[str, Trend]:
        """Of the second half of the run, by role."""
        half = self.samples[len(self.samples) // 2 :]
        return {role: trend([(s.seconds, s.memory.get(role, 0)) for s in half]) for role in sorted(half[0].memory)}

    def table(self) -> str:
        """Memory by role: at the first sample, at the middle, at the end, and its slope since the middle."""
        lines = [f"{'RSS, MiB':12}{'first':>9}{'middle':>9}{'last':>9}{'MiB/h':>10}{'growth':>9}"]
        for role, its in self.trends().items():
            first = self.samples[0].memory.get(role, 0)
            sizes = "".join(f"{size / 2**20:9.1f}" for size in (first, its.first, its.last))
            lines.append(f"{role:12}{sizes}{3600 * its.slope / 2**20:10.1f}{its.growth:9.2%}")
        most = max(sample.waiting for sample in self.samples)
        return "\n".join([*lines, f"most waiting: {most:g} of {QUEUE_LIMIT}", f"requests: {dict(self.outcomes)}"])


async def ask(http: httpx.AsyncClient, rng: random.Random) -> str:
    """One streamed answer; how it ended."""
    words = rng.randint(*PROMPTS)
    body = {
        "model": MODEL,
        "prompt": " ".join(f"word{rng.randrange(10_000)}" for _ in range(words)),
        "max_tokens": rng.randint(*OUTPUTS),
        "ignore_eos": True,
        "stream": True,
    }
    done, finish = False, None
    try:
        async with http.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                await response.aread()
                return "refused" if response.status_code == 429 else f"HTTP {response.status_code}"
            async for line in response.aiter_lines():
                done |= line == "data: [DONE]"
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        return "error event"
                    finish = next((c["finish_reason"] for c in event["choices"] if c["finish_reason"]), finish)
    except httpx.TransportError as error:
        return type(error).__name__
    return "served" if done and finish == "length" else "cut off"


async def ask_and_leave(http: httpx.AsyncClient, rng: random.Random) -> str:
    """Ask, and close the connection after a random time."""
    try:
        async with asyncio.timeout(rng.expovariate(1 / MEAN_STAY_S)):
            return await ask(http, rng)
    except TimeoutError:
        return "left"


async def capacity(http: httpx.AsyncClient, rng: random.Random) -> float:
    """Requests a second that it serves when clients never stop asking; the first third is not counted."""
    ends: list[float] = []
    begun = time.monotonic()

    async def client() -> None:
        while time.monotonic() - begun < CALIBRATE_S or len(ends) < LEAST_SERVED:
            if await ask(http, rng) == "served":
                ends.append(time.monotonic())
            else:
                await asyncio.sleep(0.2)

    async with asyncio.timeout(CALIBRATE_LIMIT_S):
        await asyncio.gather(*(client() for _ in range(BUSY_CLIENTS)))
    busy = ends[: max(LEAST_SERVED, len(ends) - BUSY_CLIENTS)]  # those after it are answered as the load goes down
    first = len(busy) // 3
    return (len(busy) - 1 - first) / (busy[-1] - busy[first])


async def look(http: httpx.AsyncClient, begun: float, run_folder: Path) -> Sample:
    """Memory and gauges now."""
    from deployments.processes import marked

    processes = await asyncio.to_thread(lambda: tuple(resident(marked(run_folder))))
    page = (await http.get("/metrics")).raise_for_status().text
    sums = dict.fromkeys(GAUGES, 0.0)
    for family in text_string_to_metric_families(page):
        if family.name in sums:
            sums[family.name] += sum(sample.value for sample in family.samples)
    waiting, held, granted = (sums[name] for name in GAUGES)
    return Sample(time.monotonic() - begun, processes, waiting, held, granted)


async def soak(url: str, run_folder: Path, minutes: float, rng: random.Random) -> Soak:
    """Calibrate, load, watch, and wait until nothing is left."""
    found, limits = Soak(), httpx.Limits(max_connections=None, max_keepalive_connections=100)
    async with httpx.AsyncClient(base_url=url, timeout=120.0, limits=limits) as http:
        rate = OVERLOAD * await capacity(http, rng)
        print(f"capacity {rate / OVERLOAD:.2f} requests/s; sent {rate:.2f}, and {rate * LEAVERS:.2f} that leave")
        begun = time.monotonic()
        async with asyncio.TaskGroup() as group:
            load = group.create_task(_send(http, rng, rate, begun + 60 * minutes, found.outcomes))
            while not load.done():
                found.samples.append(await look(http, begun, run_folder))
                await asyncio.sleep(SAMPLE_S)
        await _until_idle(http, begun, run_folder, found)
    return found


async def _send(http: httpx.AsyncClient, rng: random.Random, rate: float, until: float, outcomes: Counter[str]) -> None:
    """Requests at random times, those that leave among them; returns when all have ended."""

    async def count(leaves: bool) -> None:
        outcomes[await (ask_and_leave if leaves else ask)(http, rng)] += 1

    async with asyncio.TaskGroup() as group:
        while time.monotonic() < until:
            await asyncio.sleep(rng.expovariate(rate * (1 + LEAVERS)))
            group.create_task(count(rng.random() < LEAVERS / (1 + LEAVERS)))


async def _until_idle(http: httpx.AsyncClient, begun: float, run_folder: Path, found: Soak) -> None:
    """One more sample: the first one with nothing left, or the last one in time."""
    deadline = time.monotonic() + IDLE_LIMIT_S
    while True:
        sample = await look(http, begun, run_folder)
        if time.monotonic() > deadline or not (sample.waiting or sample.held or sample.granted):
            found.samples.append(sample)
            return
        await asyncio.sleep(1.0)


@contextmanager
def service() -> Iterator[tuple[str, Path]]:
    """A service with a Ray of its own: (URL, folder that marks its processes)."""
    from benchmarks.server import free_port
    from deployments.home import state_folder
    from deployments.local_ray import LocalRay
    from deployments.processes import MARK

    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    port = free_port()
    ray = LocalRay(state_folder(), cpus=os.cpu_count() or 1)
    ray.start()
    try:
        _deploy(port)
        yield f"http://127.0.0.1:{port}", Path(os.environ[MARK])
    finally:
        ray.stop()


def _deploy(port: int) -> None:
    from deployments import service as running
    from deployments.config_file import read_config

    model = {"name": MODEL, "source": "demo", "queue_limit": QUEUE_LIMIT, "pools": [{"replicas": 2, **POOL}]}
    args = {"models": [model], "api": {"replicas": 2}}
    application = {"name": "headroom", "import_path": "deployments.app:build", "args": args}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "serve_config.yaml"
        path.write_text(yaml.safe_dump({"http_options": {"port": port}, "applications": [application]}))
        file = read_config(path)
    running.deploy(file)
    deadline = time.monotonic() + START_LIMIT_S

    def check() -> None:
        if time.monotonic() > deadline:
            raise RuntimeError(f"the service was not ready within {START_LIMIT_S:g} s")

    running.wait_until_ready(file, print, check)


def main(arguments: Sequence[str] | None = None) -> int:
    """Soak, print, and 1 when something must not be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0, help="of load, after the calibration")
    parser.add_argument("--growth", type=float, default=0.05, help="share by which a role may grow in the second half")
    parser.add_argument("--seed", type=int, default=0, help="of requests, arrivals and departures")
    chosen = parser.parse_args(arguments)
    with service() as (url, run_folder):
        found = asyncio.run(soak(url, run_folder, chosen.minutes, random.Random(chosen.seed)))
    print(found.table())
    faults = found.faults(chosen.growth)
    print("\n".join(faults) or "no block, request or process is left over, and memory is flat")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
