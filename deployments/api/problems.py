"""Errors as OpenAI's clients read them."""

from __future__ import annotations

from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from deployments.api.visit import visit_of
from deployments.errors import BodyTimeout, HttpStatus, RequestError, RequestTimeout, Unauthorized, http_status

_ROUTING_CODES = {404: "not_found", 405: "method_not_allowed"}


def error_body(message: str, kind: str, param: str | None, code: str | None) -> dict[str, Any]:
    """The body that every error answer has."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def describe(error: Exception) -> dict[str, Any]:
    """The body for any exception. One that isn't a RequestError is ours: its text, which may quote a prompt, stays
    here."""
    if isinstance(error, RequestError):
        return error_body(error.message, http_status(error).type, error.param, error.code)
    return error_body("the server made a mistake; its log names this request's id", "server_error", None, "internal")


def answer(error: Exception) -> Response:
    """The whole answer for any exception."""
    status = http_status(error) if isinstance(error, RequestError) else HttpStatus(500, "server_error")
    return JSONResponse(describe(error), status.status, headers=_headers(error))


def _headers(error: Exception) -> dict[str, str]:
    headers = {}
    if isinstance(error, RequestError) and error.retry_after_s is not None:
        headers["retry-after"] = str(error.retry_after_s)
    if isinstance(error, Unauthorized):
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, BodyTimeout):
        headers["connection"] = "close"  # The rest of the body may come yet, and would be read as the next request.
    elif isinstance(error, RequestTimeout):
        headers["x-should-retry"] = "false"  # OpenAI's clients retry a 408 by themselves: the same work, thrice.
    return headers


async def on_request_error(request: Request, error: Exception) -> Response:
    """Starlette's handler for RequestError."""
    assert isinstance(error, RequestError)
    visit_of(request).error = error.code
    return answer(error)


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's handler for unknown paths and wrong methods; a bare OPTIONS lists the methods."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405 and request.method == "OPTIONS":
        return Response(status_code=204, headers=error.headers)
    where = f"{request.method} {request.url.path[:200]}"
    message = f"there is no {where}" if error.status_code in _ROUTING_CODES else f"{where}: {error.detail}"
    code = _ROUTING_CODES.get(error.status_code)
    body = error_body(message, "invalid_request_error", None, code)
    return JSONResponse(body, error.status_code, headers=error.headers)
