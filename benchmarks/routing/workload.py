"""Simulated requests: synthetic ones, chats that share prefixes, and a trace file's.

All ask for at most MAX_TOKENS of output, as clients do that don't know better. The constants are round numbers from
no trace; a trace's lengths are its own, and only its clock is scaled, to give the wanted load.
"""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import cache
from itertools import count, islice
from pathlib import Path

from benchmarks.routing.job import GRANULE, Job

MAX_TOKENS = 1024
LONGEST_PROMPT = 12_288
"""So that prompt and MAX_TOKENS fit the smallest replica of every fleet."""

Workload = Callable[[float, int, random.Random], list[Job]]
"""(requests per second, number of requests, source of randomness) -> jobs in order of arrival."""


def poisson(rate: float, number: int, rng: random.Random) -> list[Job]:
    """Independent arrivals, lognormal lengths."""
    return _lognormal(number, rng, lambda: rng.expovariate(rate))


def bursty(rate: float, number: int, rng: random.Random) -> list[Job]:
    """Gamma-distributed times between arrivals with a coefficient of variation of 4, lognormal lengths."""
    return _lognormal(number, rng, lambda: rng.gammavariate(1 / 16, 16 / rate))


def chats(rate: float, number: int, rng: random.Random) -> list[Job]:
    """Conversations: one of 32 system prompts, by Zipf's law, and four turns on average, each with all before it.

    A user's next message comes some seconds after the last; turns don't wait for the answers, so that the load offered
    is the same whatever the policy.
    """
    turns = 4
    granule_ids = count()
    systems = [[next(granule_ids) for _ in range(rng.randint(8, 32))] for _ in range(32)]
    weights = [1 / (k + 1) for k in range(len(systems))]
    sessions = -(-2 * number // turns)
    lead = 60.0
    jobs: list[Job] = []
    start = 0.0
    for _ in range(sessions + int(lead * rate / turns)):
        start += rng.expovariate(rate / turns)
        system = rng.choices(systems, weights)[0]
        jobs += _session(start, system, 1 - 1 / turns, granule_ids, rng)
    settled = (job for job in sorted(jobs, key=lambda job: job.arrival) if job.arrival >= lead)
    return _numbered(islice(settled, number), -lead)


def trace(path: Path) -> Workload:
    """The requests of a file with columns TIMESTAMP, ContextTokens, GeneratedTokens, from a random place on, wrapping
    around at its end.

    Raises:
        ValueError: the file has other columns or no rows.
    """
    rows = _read(path)

    def replay(rate: float, number: int, rng: random.Random) -> list[Job]:
        scale = (len(rows) - 1) / (rows[-1][0] - rows[0][0]) / rate
        at, offset = 0.0, rng.randrange(len(rows))
        jobs = []
        for index in range(number):
            time, prompt, output = rows[(offset + index) % len(rows)]
            jobs.append(Job(index, at, prompt, output, MAX_TOKENS))
            following = rows[(offset + index + 1) % len(rows)][0]
            at += max(0.0, following - time) * scale
        return jobs

    return replay


@cache
def _read(path: Path) -> list[tuple[float, int, int]]:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        wanted = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]
        if reader.fieldnames != wanted:
            raise ValueError(f"{path}: the columns must be {','.join(wanted)}, they are {reader.fieldnames}")
        rows = [
            # Seven digits of a second; fromisoformat reads six.
            (datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp(), *_lengths(row))
            for row in reader
        ]
    if len(rows) < 2:
        raise ValueError(f"{path}: at least two requests are needed, it has {len(rows)}")
    return rows


def _lengths(row: dict[str, str]) -> tuple[int, int]:
    prompt, output = int(row["ContextTokens"]), int(row["GeneratedTokens"])
    return min(max(prompt, 1), LONGEST_PROMPT), min(max(output, 1), MAX_TOKENS)


def _lognormal(number: int, rng: random.Random, gap: Callable[[], float]) -> list[Job]:
    jobs, at = [], 0.0
    for index in range(number):
        at += gap()
        prompt = _length(rng, 512, 1.0, LONGEST_PROMPT)
        jobs.append(Job(index, at, prompt, _length(rng, 128, 0.9, MAX_TOKENS), MAX_TOKENS))
    return jobs


def _length(rng: random.Random, median: int, sigma: float, most: int) -> int:
    return min(most, max(1, round(median * math.exp(rng.gauss(0.0, sigma)))))


def _session(at: float, system: list[int], go_on: float, ids: Iterator[int], rng: random.Random) -> list[Job]:
    jobs: list[Job] = []
    granules, length = list(system), len(system) * GRANULE
    while True:
        length += _length(rng, 64, 0.8, 2048)
        output = _length(rng, 128, 0.9, MAX_TOKENS)
        if length > LONGEST_PROMPT:
            return jobs
        granules += islice(ids, (length + output) // GRANULE - len(granules))
        jobs.append(Job(0, at, length, output, MAX_TOKENS, tuple(granules)))
        length += output
        if rng.random() > go_on:
            return jobs
        at += 5.0 + rng.expovariate(1 / 10)


def _numbered(jobs: Iterator[Job], shift: float) -> list[Job]:
    numbered = list(jobs)
    for index, job in enumerate(numbered):
        job.index, job.arrival = index, job.arrival + shift
    return numbered
