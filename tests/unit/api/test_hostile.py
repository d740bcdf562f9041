"""Wrong keys, header tricks and bad bodies on a real socket: nothing gets in, nothing leaks, the app stays up."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from deployments.api.keys import ApiKey, digest, line_of
from deployments.settings import ApiSettings
from tests.fakes.dispatcher import Script
from tests.unit.api.conftest import Api
from tests.unit.api.test_chat import CHAT, asking

KEY = "hr-SECRET-key-of-alice"
ADMIN = "hr-SECRET-key-of-admin"
GENEROUS_S = 60
BODY = json.dumps(asking()).encode()


async def until_end(reader: asyncio.StreamReader) -> bytes:
    """What comes before the connection is closed, or reset because some of the request was never read."""
    answer = b""
    try:
        while block := await reader.read(65536):
            answer += block
    except ConnectionError:
        pass
    return answer


class Door:
    """A server on a port of its own, and raw requests to it."""

    def __init__(self, api: Api, port: int) -> None:
        self.api = api
        self.port = port

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            yield reader, writer
        finally:
            writer.close()

    async def send(self, raw: bytes) -> tuple[int, bytes]:
        """Status and all that is answered until the connection ends; 0 where it ends without a word."""
        async with asyncio.timeout(GENEROUS_S), self.connection() as (reader, writer):
            writer.write(raw)
            answer = await until_end(reader)
        return int(answer.split(b" ", 2)[1]) if answer else 0, answer

    async def ask(
        self, *headers: bytes, line: bytes = b"POST " + CHAT.encode(), body: bytes = BODY
    ) -> tuple[int, bytes]:
        """A request with these header lines."""
        length = b"content-length: %d" % len(body)
        lines = [line + b" HTTP/1.1", b"host: x", b"connection: close", length, *headers]
        return await self.send(b"\r\n".join([*lines, b"", body]))


@pytest.fixture(params=["h11", "httptools"])
async def door(
    request: Any, make_api: Callable[..., Api], speak: Callable[..., Script], tmp_path: Path
) -> AsyncIterator[Door]:
    path = tmp_path / "keys.yaml"
    entries = (("alice", KEY, ("api",)), ("watcher", ADMIN, ("admin",)))
    path.write_text("".join(line_of(ApiKey(name=n, sha256=digest(k.encode()), roles=r)) + "\n" for n, k, r in entries))
    api = make_api(
        speak("hello world"), ApiSettings(api_keys_file=str(path), body_timeout_s=0.5, max_body_bytes=100_000)
    )
    config = uvicorn.Config(api.app, port=0, http=request.param, log_config=None, lifespan="off")
    server = uvicorn.Server(config)
    config.load()
    listener = config.bind_socket()
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    async with asyncio.timeout(GENEROUS_S):
        while not server.started:
            await asyncio.sleep(0.01)
    yield Door(api, listener.getsockname()[1])
    server.should_exit = True
    await serving
    listener.close()


def bearer(key: str) -> bytes:
    return f"Authorization: Bearer {key}".encode()


async def still_serves(door: Door) -> None:
    assert (await door.ask(bearer(KEY)))[0] == 200
    assert not door.api.dispatcher.running


TRICKS: dict[str, tuple[bytes, ...]] = {
    "none": (),
    "wrong": (bearer("hr-wrong"),),
    "empty": (b"Authorization:",),
    "no key": (b"Authorization: Bearer ",),
    "a part": (bearer(KEY[:-1]),),
    "and more": (bearer(KEY + "x"),),
    "its hash": (bearer(digest(KEY.encode())),),
    "its name": (bearer("alice"),),
    "twice": (bearer(KEY), bearer(KEY)),
    "wrong, then right": (bearer("x"), bearer(KEY)),
    "right, then wrong": (bearer(KEY), bearer("x")),
    "joined": (bearer(KEY + ", Bearer " + KEY),),
    "basic": (b"Authorization: Basic " + KEY.encode(),),
    "digest": (b"Authorization: Digest " + KEY.encode(),),
    "no scheme": (b"Authorization: " + KEY.encode(),),
    "quoted": (bearer(f'"{KEY}"'),),
    "with a colon": (b"Authorization: Bearer: " + KEY.encode(),),
    "other header": (b"X-Api-Key: " + KEY.encode(), b"Proxy-Authorization: Bearer " + KEY.encode()),
    "cookie": (b"Cookie: Authorization=Bearer " + KEY.encode(),),
    "underscore": (b"Authorization_: Bearer " + KEY.encode(),),
    "not ASCII": (b"Authorization: Bearer \xff\xfe\xc3\xa9",),
    "not ASCII space": (b"Authorization: Bearer\xa0" + KEY.encode(),),
    "key and byte": (b"Authorization: Bearer " + KEY.encode() + b"\xa0",),
    "null": (b"Authorization: Bearer " + KEY.encode() + b"\0",),
    "huge": (b"Authorization: Bearer " + b"x" * 200_000,),
    "many": tuple(b"X-%d: y" % i for i in range(2000)),
    "other client": (b"X-Forwarded-For: 127.0.0.1", b"X-Real-IP: 127.0.0.1", b"Forwarded: for=127.0.0.1"),
    "overrides": (b"X-HTTP-Method-Override: GET", b"X-Original-URL: /health", b"X-Rewrite-URL: /health"),
}


async def test_no_trick_with_headers_gets_in(door: Door, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "headroom")
    for name, headers in TRICKS.items():
        for line in (b"POST /v1/chat/completions", b"GET /v1/models", b"GET /metrics"):
            status, answer = await door.ask(*headers, line=line)
            assert status in (0, 400, 401, 431), (name, line, status)
            assert b"tiny" not in answer, name  # the model's name
            assert b"alice" not in answer, name
            assert b"SECRET" not in answer, name
            assert b"Traceback" not in answer, name
    assert not door.api.dispatcher.requests
    assert "SECRET" not in caplog.text
    await still_serves(door)


async def test_no_trick_with_paths_gets_in(door: Door) -> None:
    paths = (
        "//v1/models", "/v1//models", "/V1/models", "/v1/models/", "/v1/models/tiny", "/v1/models/%74iny",
        "/health/../v1/models", "/health/..%2fv1/models", "/health;/../metrics", "/metrics/", "/metrics%00",
        "/./metrics", "/health%2f..%2fmetrics", "/openapi.json/../metrics", "/metrics?key=x", "http://x/v1/models", "*",
    )  # fmt: skip
    for path in paths:
        status, answer = await door.ask(line=b"GET " + path.encode(), body=b"")
        assert status in (400, 401, 404), path
        assert b"root" not in answer, path
        assert b"headroom_" not in answer, path
    await still_serves(door)


async def test_roles_do_not_reach_over(door: Door) -> None:
    assert (await door.ask(bearer(ADMIN)))[0] == 403
    assert (await door.ask(bearer(KEY), line=b"GET /metrics"))[0] == 403
    assert not door.api.dispatcher.requests
    await still_serves(door)


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 90_000,
        b'{"a":' * 15_000,
        b'{"model": "tiny", "metadata": ' + b'{"a":' * 10_000 + b"1" + b"}" * 10_001,
        b"\xff\xfe",
        b'{"model": "tiny", "messages": [{"role": "user", "content": "\xed\xa0\x80"}]}',
        b"\0" * 1000,
        b'{"model": ' + b"9" * 90_000 + b"}",
        json.dumps(asking(stop=["a" * 80_000])).encode(),
        json.dumps(asking(logit_bias={str(i): 1 for i in range(5000)})).encode(),
        json.dumps(asking(n=10**9)).encode(),
    ],
    ids=lambda body: repr(body[:20]),
)
async def test_bad_bodies(door: Door, body: bytes) -> None:
    status, answer = await door.ask(bearer(KEY), body=body)
    assert status == 400
    assert b"invalid_request_error" in answer
    assert b"Traceback" not in answer
    assert (await door.ask(body=body))[0] == 401  # without a key it is not even read
    await still_serves(door)


async def test_huge_bodies(door: Door) -> None:
    declared = (bearer(KEY), b"host: x", b"content-length: 99999999999999")
    status, answer = await door.send(
        b"\r\n".join([b"POST %s HTTP/1.1" % CHAT.encode(), *declared, b"connection: close", b"", b"x"])
    )
    assert (status, b"request_too_large" in answer) == (413, True)
    endless = b"\r\n".join(
        [
            b"POST %s HTTP/1.1" % CHAT.encode(),
            bearer(KEY),
            b"host: x",
            b"transfer-encoding: chunked",
            b"connection: close",
            b"",
        ]
    )
    chunks = b"".join(b"\r\n1000\r\n" + b"x" * 0x1000 for _ in range(40))
    status, answer = await door.send(endless + chunks)
    assert status in (0, 413)  # 0: cut off while it still sends
    await still_serves(door)


async def test_a_body_that_drips(door: Door) -> None:
    """It is answered and cut off after `body_timeout_s`, and holds nobody up meanwhile."""
    head = [b"POST %s HTTP/1.1" % CHAT.encode(), b"host: x", b"content-length: 5000", bearer(KEY), b"", b'{"model"']
    async with asyncio.timeout(GENEROUS_S), door.connection() as (reader, writer):
        writer.write(b"\r\n".join(head))
        answered = asyncio.create_task(until_end(reader))
        drops = 0
        while not answered.done():
            drops += 1
            if not writer.is_closing():
                writer.write(b" ")
            await still_serves(door)
            await asyncio.sleep(0.05)
        answer = await answered
    assert drops > 1
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"body_timeout"' in answer
    assert b"connection: close" in answer.lower()
    await still_serves(door)


async def test_many_bodies_that_never_come(door: Door) -> None:
    head = [b"POST %s HTTP/1.1" % CHAT.encode(), b"host: x", b"content-length: 5000", bearer(KEY), b"", b""]

    async def slow() -> int:
        return (await door.send(b"\r\n".join(head)))[0]

    waiting = [asyncio.create_task(slow()) for _ in range(50)]
    await still_serves(door)
    assert await asyncio.gather(*waiting) == [408] * 50
    await still_serves(door)
