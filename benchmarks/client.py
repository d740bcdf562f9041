"""Closed-loop HTTP clients: each sends its next request when the answer to the last one is complete."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx


class LoadFailed(Exception):
    """A request was not served as asked, so that there is nothing to measure."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One streamed answer. Instants are seconds of one monotonic clock."""

    prompt: str
    sent: float
    arrivals: tuple[float, ...]
    """When each piece of text came; a piece may hold several tokens."""
    ended: float
    prompt_tokens: int
    output_tokens: int
    text: str
    lengths: tuple[int, ...] = ()
    """Characters of each piece."""

    @property
    def ttft(self) -> float:
        """Seconds from sending to the first text."""
        return self.arrivals[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        """Seconds between pieces of text, as the client sees them."""
        return [later - earlier for earlier, later in zip(self.arrivals, self.arrivals[1:], strict=False)]

    @property
    def end_to_end(self) -> float:
        """Seconds from sending to the end of the stream."""
        return self.ended - self.sent


def rate(answers: Sequence[Answer]) -> float:
    """Output tokens per second of the time in which at least one request was under way."""
    busy, until = 0.0, -math.inf
    for answer in sorted(answers, key=lambda a: a.sent):
        busy += max(0.0, answer.ended - max(answer.sent, until))
        until = max(until, answer.ended)
    return sum(a.output_tokens for a in answers) / busy


async def run_clients(
    http: httpx.AsyncClient,
    model: str,
    prompts: Sequence[str],
    *,
    clients: int,
    output_tokens: int,
    done: Callable[[], object],
) -> list[Answer]:
    """Send every prompt once, `clients` at a time; `done` is called after each answer.

    Raises:
        LoadFailed: an answer was refused, broke off, or has another length than asked for.
    """
    waiting = iter(prompts)
    answers: list[Answer] = []

    async def client() -> None:
        for prompt in waiting:
            answers.append(await stream(http, model, prompt, output_tokens))
            done()

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(client())
    except ExceptionGroup as failed:  # what `except*` raises, Python 3.11.2 wraps in a group
        ours, others = failed.split((LoadFailed, httpx.HTTPError))
        if ours is None or others is not None:
            raise
        first = ours.exceptions[0]
        raise LoadFailed(str(first) or type(first).__name__) from first
    return answers


async def stream(http: httpx.AsyncClient, model: str, prompt: str, output_tokens: int) -> Answer:
    """One chat turn, greedy, of exactly `output_tokens` tokens."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": output_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    sent = time.perf_counter()
    arrivals: list[float] = []
    text: list[str] = []
    usage: dict[str, Any] = {}
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            raise LoadFailed(f"HTTP {response.status_code}: {(await response.aread()).decode(errors='replace')}")
        async for line in response.aiter_lines():
            for event in _events(line):
                usage = event.get("usage") or usage
                for piece in _pieces(event):
                    arrivals.append(time.perf_counter())
                    text.append(piece)
    ended = time.perf_counter()
    if not arrivals or usage.get("completion_tokens") != output_tokens:
        raise LoadFailed(f"asked for {output_tokens} tokens, got usage {usage} and {len(arrivals)} pieces of text")
    lengths = tuple(map(len, text))
    return Answer(prompt, sent, tuple(arrivals), ended, usage["prompt_tokens"], output_tokens, "".join(text), lengths)


def _events(line: str) -> Iterator[dict[str, Any]]:
    if not line.startswith("data: ") or line == "data: [DONE]":
        return
    event = json.loads(line.removeprefix("data: "))
    if "error" in event:
        raise LoadFailed(f"the stream ended with {event['error']}")
    yield event


def _pieces(event: dict[str, Any]) -> Iterator[str]:
    for choice in event["choices"]:
        if content := choice["delta"].get("content"):
            yield content
