"""Headers that Serve itself reads, before the API sees a request: a client's own don't get that far.

Serve takes a request's id, timeout, session and multiplexed model from the client's headers, and a wish not to be
watched for leaving. It answers 500 by itself where one of them is not UTF-8. None but the id means anything here, and
`api.request_timeout_s` is not the client's to raise. To answers it adds the id that the API has put there already.
Serve finds `middlewares` by a variable (`MIDDLEWARES`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MIDDLEWARES = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
"""Read by Serve's proxies and ingress replicas when they start."""
IMPORT_PATH = f"{__name__}:middlewares"
REQUEST_ID = "x-request-id"
_SANE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SERVES_OWN = frozenset(
    {b"x-request-timeout-seconds", b"x-request-disconnect-disabled", b"serve-multiplexed-model-id", b"x-session-id"}
)
"""With dashes: Serve takes underscores for them in some."""


def is_sane_id(text: str) -> bool:
    """Whether a client's request id is short and plain; others are replaced."""
    return _SANE_ID.fullmatch(text) is not None


def middlewares() -> list[Middleware]:
    """What Serve is to wrap its HTTP servers in."""
    return [Middleware(HeaderFilter)]


class HeaderFilter:
    """Takes from each request what Serve is not to read, and from each answer what it says twice."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self._app(scope, receive, send)

        async def send_id_once(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": _with_one_id(message.get("headers", ()))}
            await send(message)

        scope = {**scope, "headers": [(name, value) for name, value in scope["headers"] if _stays(name, value)]}
        await self._app(scope, receive, send_id_once)


def _with_one_id(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """`headers` without ids after the first, which is the API's own."""
    found, seen = [], False
    for name, value in headers:
        is_id = name.lower() == REQUEST_ID.encode()
        if not (is_id and seen):
            found.append((name, value))
        seen |= is_id
    return found


def _stays(name: bytes, value: bytes) -> bool:
    if name == REQUEST_ID.encode():
        return is_sane_id(value.decode("latin-1"))
    return name.replace(b"_", b"-") not in _SERVES_OWN
