"""Open-loop HTTP clients: each request is sent at its own time, whatever became of those before it."""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

import httpx

from benchmarks.client import LoadFailed
from benchmarks.routing.job import Job

PLAIN_IDS = (1000, 40_000)
"""Token ids of the embedded model that are ordinary words."""


@dataclass(frozen=True, slots=True)
class Served:
    """What one client got. Seconds of wall-clock time; infinite for a refused request."""

    ttft: float
    end_to_end: float
    refused: bool


async def send_all(url: str, model: str, jobs: Sequence[Job], slow: float, limit_s: float) -> list[Served]:
    """Send every job at its arrival, `slow` times as late.

    Args:
        url: of the service.
        model: the name that it serves.
        jobs: in order of arrival; lengths and arrivals are used.
        slow: wall-clock seconds of a simulated second.
        limit_s: most seconds between two pieces of an answer.

    Raises:
        LoadFailed: a request was neither answered in full nor refused with 429.
    """
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
    async with httpx.AsyncClient(base_url=url, timeout=limit_s, limits=limits) as http:
        begun = time.monotonic()
        async with asyncio.TaskGroup() as group:
            tasks = []
            for job in jobs:
                await asyncio.sleep(max(0.0, begun + job.arrival * slow - time.monotonic()))
                tasks.append(group.create_task(_send(http, model, job)))
    return [task.result() for task in tasks]


async def _send(http: httpx.AsyncClient, model: str, job: Job) -> Served:
    rng = random.Random(job.index)
    body = {
        "model": model,
        "prompt": [rng.randrange(*PLAIN_IDS) for _ in range(job.prompt)],
        "max_tokens": job.max_tokens,
        "seed": job.output,  # How many tokens the paced replica will produce.
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    sent = time.monotonic()
    first, tokens, done = math.inf, 0, False
    async with http.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code == 429:
            await response.aread()
            return Served(math.inf, math.inf, refused=True)
        if response.status_code != 200:
            raise LoadFailed(f"HTTP {response.status_code}: {(await response.aread()).decode(errors='replace')}")
        async for line in response.aiter_lines():
            done |= line == "data: [DONE]"
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise LoadFailed(f"request {job.index} ended with {event['error']}")
            if any(choice["text"] for choice in event["choices"]):
                first = min(first, time.monotonic() - sent)
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    if not done or tokens != job.output:
        raise LoadFailed(f"request {job.index} got {tokens} tokens instead of {job.output}, whole: {done}")
    return Served(first, time.monotonic() - sent, refused=False)
