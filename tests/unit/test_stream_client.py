"""The integration tests' client: what it says of connections that break, and a pool that breaks none itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import httpx
import pytest

from tests.integration.stream_client import ONE_REQUEST_EACH, stream

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
EXPIRY_S = 0.2


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


WHOLE = HEAD + chunk(b'data: {"choices": [{"text": "so", "finish_reason": "length"}]}\n\ndata: [DONE]\n\n') + chunk(b"")


async def read_request(reader: asyncio.StreamReader) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    await reader.readexactly(int(length.partition(b":")[2]))


@asynccontextmanager
async def pool_to(serve: Serve, limits: httpx.Limits) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a server that lives as long."""
    running: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        running.add(task)
        try:
            await serve(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client has left
        finally:
            writer.close()
            running.discard(task)

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        async with httpx.AsyncClient(base_url=url, limits=limits, timeout=30.0) as client:
            yield client
        await asyncio.gather(*running)
    finally:
        server.close()


@pytest.mark.parametrize(
    ("sent", "status", "text"),
    [(b"", None, ""), (HEAD, 200, ""), (HEAD + chunk(b'data: {"choices": [{"text": "so'), 200, "")],
)
async def test_a_broken_connection_has_the_status_that_came_and_no_other(
    sent: bytes, status: int | None, text: str
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(sent)
        await writer.drain()

    async with pool_to(serve, ONE_REQUEST_EACH) as client:
        answer = await stream(client, {})
    assert (answer.status, answer.text, answer.done, answer.whole) == (status, text, False, False)
    assert "RemoteProtocolError" in (answer.error or "")
    assert (answer.answered is None) == (status is None)
    assert ("no status" in answer.history(answer.sent)) == (status is None)


async def give_whole(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        await read_request(reader)
        await asyncio.sleep(0.01)  # so that it is not there before the client looks
        writer.write(WHOLE)
        await writer.drain()


async def broken_by_the_pool(limits: httpx.Limits, others: int = 4) -> list[str]:
    """Errors of two requests, of which one is given the only idle connection just before `others` become idle too,
    and the second comes after the loop was busy for longer than connections may be idle."""

    async def ask(client: httpx.AsyncClient, busy_s: float) -> str | None:
        await asyncio.sleep(0)
        time.sleep(busy_s)
        return (await stream(client, {})).error

    async with pool_to(give_whole, limits) as client:
        held = [client.stream("POST", "/", json={}) for _ in range(others)]
        opened = [await one.__aenter__() for one in held]
        assert (await stream(client, {})).whole
        first = asyncio.create_task(ask(client, 0.0))
        ends = [asyncio.create_task(response.aread()) for response in opened]
        second = asyncio.create_task(ask(client, 1.5 * EXPIRY_S))
        errors = await asyncio.gather(first, second)
        await asyncio.gather(*ends)
        for one in held:
            await one.__aexit__(None, None, None)
    return [error for error in errors if error is not None]


async def test_a_pool_without_idle_connections_closes_none_that_it_has_given_away() -> None:
    limits = httpx.Limits(
        max_connections=ONE_REQUEST_EACH.max_connections,
        max_keepalive_connections=ONE_REQUEST_EACH.max_keepalive_connections,
        keepalive_expiry=EXPIRY_S,
    )
    assert await broken_by_the_pool(limits) == []


async def test_a_pool_with_idle_connections_does_and_the_error_says_who_closed_it() -> None:
    """Should this fail with a newer httpcore, `ONE_REQUEST_EACH` may go."""
    (error,) = await broken_by_the_pool(httpx.Limits(keepalive_expiry=EXPIRY_S))
    assert "ReadError" in error
    assert "ClosedResourceError" in error
