"""What surrounds every request: its id, the answer to a mistake of ours, and one line in the access log."""

from __future__ import annotations

import asyncio
import json
import logging
import traceback

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.api.headers import REQUEST_ID, is_sane_id
from deployments.api.problems import answer
from deployments.api.visit import SCOPE_KEY, Visit
from deployments.metrics.meter import IngressMeter, ModelMeter

CLIENT_GONE = 499
"""Logged as the status when the client left before there was one; never sent."""
_PROBES = frozenset({"/health", "/ready", "/metrics", "/fleet/state"})
"""Paths that machines ask all the time: no line in the log, and not counted."""
_log = logging.getLogger("headroom.access")


class AccessMiddleware:
    """The outermost layer of the app.

    Args:
        meter: counts the requests.
    """

    def __init__(self, app: ASGIApp, meter: IngressMeter) -> None:
        self._app = app
        self._meter = meter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        visit = scope[SCOPE_KEY] = _open(scope)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                visit.status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = visit.request_id
            await send(message)
            if message["type"] == "http.response.body":
                visit.complete = not message.get("more_body", False)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            pass  # While its body was read; the line in the log says 499.
        except Exception as error:  # noqa: BLE001 - the last layer: whatever it is, the client gets an answer
            _report(visit, error)
            if visit.status is None:
                await answer(error)(scope, receive, send_with_id)
            elif not visit.complete:  # Too late for an answer: the server is to cut the connection.
                raise RuntimeError(f"the answer to request {visit.request_id} broke off") from None
        finally:
            if visit.admission is not None:
                visit.admission.leave(visit.used_tokens)
            _write_line(visit, scope)
            if not _is_probe(visit, scope):
                _count(visit, self._meter.of(visit.model))


def _is_probe(visit: Visit, scope: Scope) -> bool:
    """Whether a machine asked what machines ask all the time, and was not refused."""
    path: str = scope["path"].removeprefix(scope.get("root_path", ""))
    return path in _PROBES and visit.error is None


def _open(scope: Scope) -> Visit:
    now = asyncio.get_running_loop().time()
    visit = Visit("", now)
    given = Headers(scope=scope).get(REQUEST_ID, "")
    visit.request_id = given if is_sane_id(given) else visit.unique
    return visit


def _report(visit: Visit, error: Exception) -> None:
    """Log a mistake of ours by type and place. Not its message: it may quote what the client sent."""
    visit.error = "internal"
    frames = "".join(traceback.format_tb(error.__traceback__))
    _log.error("request %s failed with %s at\n%s", visit.request_id, type(error).__name__, frames)


def _write_line(visit: Visit, scope: Scope) -> None:
    now = asyncio.get_running_loop().time()
    line = {
        "request_id": visit.request_id,
        "method": scope["method"],
        "path": scope["path"][:200],
        "status": visit.status or CLIENT_GONE,
        "error": visit.error,
        "key": visit.key,
        "model": visit.model,
        "choices": visit.choices,
        "prompt_tokens": visit.prompt_tokens,
        "cached_tokens": visit.cached_tokens,
        "output_tokens": visit.output_tokens,
        "grant_s": _since(visit, visit.granted),
        "first_token_s": _since(visit, visit.first_token),
        "total_s": _since(visit, now),
    }
    _log.log(logging.DEBUG if _is_probe(visit, scope) else logging.INFO, "%s", json.dumps(line))


def _count(visit: Visit, meter: ModelMeter) -> None:
    meter.outcomes[visit.outcome] += 1
    if visit.first_token is not None:
        meter.first_token.add(visit.first_token - visit.arrived)
    if visit.granted is not None and visit.dispatched is not None:
        meter.queue.add(visit.granted - visit.dispatched)


def _since(visit: Visit, instant: float | None) -> float | None:
    return None if instant is None else round(instant - visit.arrived, 4)
