"""A client that reads one stream to its end, however it ends, and remembers what it saw, and when."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass
from typing import Any

import httpx

TIMEOUT = httpx.Timeout(120.0, pool=None)  # requests beyond the connections wait their turn
AT_ONCE = 1000
LIMITS = httpx.Limits(max_connections=AT_ONCE)
ONE_REQUEST_EACH = httpx.Limits(max_connections=AT_ONCE, max_keepalive_connections=0)
"""For hundreds of clients in one pool: no connection is used twice.

When hundreds of connections become idle together, httpcore 1.0.9 looks at each of them for each of them, for 20 s with
1,000; then those that were idle for longer than its 5 s are closed one after the other, among them some that it has
given to requests meanwhile. Such a request ends with a ReadError that no server had a part in.
"""


@dataclass(frozen=True)
class Answer:
    """What a client got of a stream. Times are of `time.monotonic`, in seconds."""

    request_id: str
    """As it was sent."""
    status: int | None
    """None: the connection broke, or was refused, before there was one."""
    text: str
    finish: str | None
    error: str | None
    """The last event's, or how the connection broke."""
    done: bool
    sent: float
    answered: float | None
    """When the status was there."""
    ended: float
    retry_after: str | None = None

    @property
    def whole(self) -> bool:
        return self.status == 200 and self.done and self.finish == "length" and self.error is None

    def history(self, begun: float) -> str:
        """All that is known of it, with times since `begun`."""
        answered = "no status" if self.answered is None else f"{self.status} at {self.answered - begun:.3f} s"
        ended = f"ended at {self.ended - begun:.3f} s after {self.text!r}, finish {self.finish}, [DONE] {self.done}"
        return f"{self.request_id}: sent at {self.sent - begun:.3f} s, {answered}, {ended}: {self.error}"


async def stream(client: httpx.AsyncClient, fields: dict[str, Any], seen: list[int] | None = None) -> Answer:
    """Ask for a completion and read it; each event is counted in `seen`."""
    request_id, sent = uuid.uuid4().hex, time.monotonic()
    status: int | None = None
    answered: float | None = None
    text, finish, error, done, again = "", None, None, False, None
    try:
        async with client.stream(
            "POST", "/v1/completions", json=fields, headers={"x-request-id": request_id}
        ) as response:
            status, answered, again = response.status_code, time.monotonic(), response.headers.get("retry-after")
            if status != 200:
                error = (await response.aread()).decode()  # ours is JSON; the proxy's is not
            async for line in response.aiter_lines():
                if status == 200 and line == "data: [DONE]":
                    done = True
                elif status == 200 and line.startswith("data: "):
                    event = json.loads(line.removeprefix("data: "))
                    error = event.get("error", {}).get("message")
                    for choice in event.get("choices", ()):
                        text += choice["text"]
                        finish = choice["finish_reason"] or finish
                    if seen is not None:
                        seen.append(1)
    except httpx.TransportError as broken:
        error, done = how(broken), False
    return Answer(request_id, status, text, finish, error, done, sent, answered, time.monotonic(), again)


def how(broken: BaseException) -> str:
    """The error and those behind it. A ReadError for a ClosedResourceError: this process closed the connection."""
    chain: list[BaseException] = []
    one: BaseException | None = broken
    while one is not None and one not in chain:
        chain.append(one)
        one = one.__cause__ or one.__context__
    return " for ".join(repr(one) for one in chain)
