"""Clients that leave and deadlines that pass: what ran for them is closed at once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from deployments.api import responses
from deployments.protocol import TokenChunk
from deployments.settings import ApiSettings
from tests.fakes.dispatcher import Script
from tests.unit.api.conftest import Api
from tests.unit.api.test_chat import CHAT, asking, events


class Connection:
    """One raw ASGI request whose client can leave."""

    def __init__(self, api: Api, body: dict[str, Any], *, reads: asyncio.Event | None = None) -> None:
        """`reads`: the client reads nothing until it is set."""
        self._reads = reads
        self.sent: list[dict[str, Any]] = []
        self.left = asyncio.Event()
        self._body: bytes | None = json.dumps(body).encode()
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
            "path": CHAT, "raw_path": CHAT.encode(), "query_string": b"", "root_path": "", "headers": [],
            "client": ("test", 1), "server": ("test", 80),
        }  # fmt: skip
        self.task = asyncio.ensure_future(api.app(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        if self._reads is not None:
            await self._reads.wait()
        self.sent.append(dict(message))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(2):
        while not condition():
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("stream", [False, True])
async def test_leaving_midway_closes_every_choice(
    make_api: Callable[..., Api], speak: Callable[..., Script], stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    api = make_api(speak("abcdefgh" * 50, step_s=0.005))
    connection = Connection(api, asking(n=3, stream=stream))
    await until(lambda: len(api.dispatcher.running) == 3)
    connection.left.set()
    async with asyncio.timeout(1):
        await connection.task
    assert not api.dispatcher.running
    assert len(api.dispatcher.cancelled) == 3
    assert bool(connection.sent) is stream
    line = json.loads(caplog.records[-1].message)
    assert (line["status"], line["error"]) == (200 if stream else 499, "client_gone")


async def test_leaving_the_queue_withdraws(make_api: Callable[..., Api]) -> None:
    api = make_api(Script(grant_after_s=60))
    connection = Connection(api, asking())
    await until(lambda: bool(api.dispatcher.requests))
    connection.left.set()
    async with asyncio.timeout(1):
        await connection.task
    assert (connection.sent, api.dispatcher.running) == ([], set())


async def test_ray_serve_cancels_instead(make_api: Callable[..., Api], speak: Callable[..., Script]) -> None:
    api = make_api(speak("abcdefgh", step_s=60))
    connection = Connection(api, asking(n=2, stream=True))
    await until(lambda: len(api.dispatcher.running) == 2)
    connection.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await connection.task
    assert not api.dispatcher.running


async def test_the_deadline_before_and_after_the_status(
    make_api: Callable[..., Api], speak: Callable[..., Script]
) -> None:
    limit = ApiSettings(request_timeout_s=0.15)
    api = make_api(speak("abcdefgh", step_s=0.05), limit)
    whole = await api.post(CHAT, json=asking())
    assert (whole.status_code, whole.headers["x-should-retry"]) == (408, "false")
    assert whole.json()["error"]["type"] == "timeout_error"
    assert "request_timeout_s" in whole.json()["error"]["message"]
    streamed = events(await api.post(CHAT, json=asking(stream=True)))
    assert streamed[-1]["error"]["code"] == "request_timeout"
    assert not api.dispatcher.running
    queued = await make_api(Script(grant_after_s=60), limit).post(CHAT, json=asking(stream=True))
    assert queued.status_code == 408


async def test_the_wait_ends_with_the_deadline(make_api: Callable[..., Api], speak: Callable[..., Script]) -> None:
    api = make_api(speak("x"), ApiSettings(request_timeout_s=5))
    await api.post(CHAT, json=asking())
    assert 4 < api.dispatcher.wait_limits[0] <= 5
    slow = make_api(speak("x"))
    await slow.post(CHAT, json=asking())
    assert slow.dispatcher.wait_limits == [60]


async def test_the_status_is_sent_at_the_grant(make_api: Callable[..., Api], speak: Callable[..., Script]) -> None:
    """Before the first token, and not before the grant."""
    api = make_api(speak("abc", step_s=60, grant_after_s=0.05))
    connection = Connection(api, asking(stream=True))
    await until(lambda: bool(api.dispatcher.requests))
    assert connection.sent == []
    await until(lambda: len(connection.sent) == 2)
    assert connection.sent[0]["status"] == 200
    assert b'"role":"assistant"' in connection.sent[1]["body"]
    connection.left.set()
    await connection.task


async def test_a_stop_string_is_acted_on_while_the_client_reads_nothing(
    make_api: Callable[..., Api], speak: Callable[..., Script]
) -> None:
    api, reads = make_api(speak("ab STOP" + "c" * 40, finish="length")), asyncio.Event()
    connection = Connection(api, asking(stream=True, stop="STOP", max_tokens=100), reads=reads)
    await until(lambda: len(api.dispatcher.cancelled) == 1)
    assert connection.sent == []
    reads.set()
    await connection.task
    content = b"".join(message.get("body", b"") for message in connection.sent)
    assert b"STOP" not in content
    assert content.endswith(b"data: [DONE]\n\n")


async def test_pieces_that_have_piled_up_go_out_together(make_api: Callable[..., Api]) -> None:
    chunks = [*(TokenChunk("", (70,)) for _ in range(200)), TokenChunk("", (), (), "length")]
    api, reads = make_api(Script(chunks)), asyncio.Event()
    connection = Connection(api, asking(stream=True), reads=reads)
    await until(lambda: len(api.dispatcher.released) == 1)
    reads.set()
    await connection.task
    bodies = [message["body"] for message in connection.sent if message["type"] == "http.response.body"]
    assert b"".join(bodies).count(b'"content"') == 201
    assert len(bodies) == 3  # The opening, all the pieces, the end.


@pytest.mark.parametrize("stream", [False, True])
async def test_the_end_of_the_answer_does_not_interrupt_a_release(
    make_api: Callable[..., Api], speak: Callable[..., Script], stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Servers report a disconnect once the answer is out, while a choice cut at a stop string is still closing."""
    caplog.set_level("INFO")
    api = make_api(speak("ab STOP" + "c" * 40, finish="length", release_s=0.03))
    connection = Connection(api, asking(stream=stream, stop="STOP", n=2, max_tokens=100))
    await until(lambda: any("body" in m and not m.get("more_body", False) for m in connection.sent))
    assert len(api.dispatcher.running) == 2
    connection.left.set()
    await connection.task
    await until(lambda: not api.dispatcher.running)
    assert len(api.dispatcher.released) == 2
    line = json.loads(caplog.records[-1].message)
    assert (line["status"], line["error"]) == (200, None)


async def test_a_deadline_during_a_release_is_no_failure(
    make_api: Callable[..., Api], speak: Callable[..., Script]
) -> None:
    api = make_api(speak("ab STOP", finish="length", release_s=0.3), ApiSettings(request_timeout_s=0.2))
    streamed = events(await api.post(CHAT, json=asking(stream=True, stop="STOP")))
    assert streamed[-1] == "data: [DONE]"


async def test_a_client_that_reads_nothing_loses_its_place_at_the_deadline(
    make_api: Callable[..., Api], speak: Callable[..., Script], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(responses, "LAST_WORD_S", 0.05)
    api = make_api(speak("ab" * 50, step_s=0.01), ApiSettings(request_timeout_s=0.2))
    connection = Connection(api, asking(stream=True, max_tokens=100), reads=asyncio.Event())
    await asyncio.wait_for(connection.task, 10)
    await until(lambda: not api.dispatcher.running)
