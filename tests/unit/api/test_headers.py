"""What Serve may read of a client's headers, held against Serve's own parsers."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from ray.serve._private import http_util
from ray.serve.config import HTTPOptions
from starlette.types import Receive, Scope, Send

from deployments.api.headers import HeaderFilter

HOST = (b"host", b"x")


async def passed(*headers: tuple[bytes, bytes]) -> list[tuple[bytes, bytes]]:
    """The headers that are left of these."""
    seen: list[Scope] = []

    async def app(scope: Scope, _receive: Receive, _send: Send) -> None:
        seen.append(scope)

    async def nothing(*_: Any) -> Any:
        raise AssertionError("nothing is received or sent here")

    given: Scope = {"type": "http", "headers": [HOST, *headers]}
    await HeaderFilter(app)(given, nothing, nothing)
    assert given["headers"] == [HOST, *headers], "the server's scope is its own"
    left: list[tuple[bytes, bytes]] = seen[0]["headers"]
    assert left.pop(0) == HOST
    return left


@pytest.mark.parametrize("value", [b"\xff", b"", b"a b", b"-x", 65 * b"x", "é".encode()])
async def test_a_wild_request_id_does_not_reach_serve(value: bytes) -> None:
    assert await passed((b"x-request-id", value)) == []


async def test_a_sane_request_id_does() -> None:
    sane = (b"x-request-id", b"my-id.7")
    assert await passed((b"x-request-id", b"\xff"), sane) == [sane]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (b"x-request-timeout-seconds", b"0.001"),
        (b"x-request-disconnect-disabled", b"?1"),
        (b"x-session-id", b"\xff"),
        (b"x_session_id", b"\xff"),
        (b"serve_multiplexed_model_id", b"\xff"),
        (b"serve-multiplexed-model-id", b"m"),
    ],
)
async def test_what_serve_would_do_by_a_header_it_does_not(name: bytes, value: bytes) -> None:
    left = dict(await passed((name, value), (b"x-forwarded-for", b"\xff")))
    assert left == {b"x-forwarded-for": b"\xff"}, "the others are nobody's business here"
    assert http_util.parse_request_timeout_header(left, 600.0) == 600.0
    assert not http_util.parse_disconnect_disabled_header(left)
    assert http_util.parse_session_id_header(left) == ""


async def test_an_answer_has_one_id_though_serve_adds_its_own() -> None:
    async def says(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-request-id", b"mine"), HOST]})
        await send({"type": "http.response.body", "body": b"x"})

    transport = httpx.ASGITransport(app=HeaderFilter(http_util.RequestIdMiddleware(says)))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        answer = await client.get("/")
    assert answer.headers.multi_items() == [("x-request-id", "mine"), ("host", "x")]
    assert answer.content == b"x"


def test_serve_wraps_its_servers_in_the_filter() -> None:
    """By the variable that `set_environment` sets, which tests/conftest.py has called before Ray was imported."""
    options = http_util.configure_http_middlewares(http_util.configure_http_options_with_defaults(HTTPOptions()))
    assert [middleware.cls for middleware in options.middlewares] == [HeaderFilter]
