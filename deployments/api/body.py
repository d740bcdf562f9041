"""A request's body: read up to the limit, then parsed as JSON proper."""

from __future__ import annotations

import asyncio
import json
from typing import Any, NoReturn

from starlette.requests import Request

from deployments.errors import BadRequest, BodyTimeout, BodyTooLarge


async def read_json_object(request: Request, limit: int, timeout_s: float) -> dict[str, Any]:
    """The JSON object in the request's body.

    Args:
        limit: most bytes, `api.max_body_bytes`.
        timeout_s: longest time for all of it, `api.body_timeout_s`.

    Raises:
        BodyTimeout: it came too slowly.
        BodyTooLarge: declared or found longer than `limit`.
        BadRequest: not UTF-8, not JSON (NaN, Infinity and numbers beyond a double are not), or not an object.
    """
    try:
        async with asyncio.timeout(timeout_s):
            content = await _read(request, limit)
    except TimeoutError:
        raise BodyTimeout(
            f"the body was not complete after {timeout_s:g} s, the server's api.body_timeout_s: send it faster, or "
            "raise it"
        ) from None
    value = _parse(content)
    if not isinstance(value, dict):
        raise BadRequest("the body must be a JSON object", code="invalid_json")
    return value


async def _read(request: Request, limit: int) -> bytes:
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > limit:
        raise _too_large(limit)
    received = bytearray()
    async for piece in request.stream():
        received += piece
        if len(received) > limit:
            raise _too_large(limit)
    return bytes(received)


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body is longer than {limit:,} bytes, the server's api.max_body_bytes")


def _parse(content: bytes) -> Any:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRequest(f"the body is not UTF-8 at byte {error.start}", code="invalid_json") from None
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
        if "\\ud" in text or "\\uD" in text:
            _refuse_lone_surrogates(value)
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at line {error.lineno}, column {error.colno}"
        raise BadRequest(f"the body is not valid JSON: {reason}", code="invalid_json") from None
    except RecursionError:
        raise BadRequest("the body is nested too deeply", code="invalid_json") from None
    except ValueError as error:
        raise BadRequest(f"the body is not valid JSON: {error}", code="invalid_json") from None
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite(digits: str) -> float:
    number = float(digits)
    if number in (float("inf"), float("-inf")):
        raise ValueError("a number is beyond the range of a double")
    return number


def _refuse_lone_surrogates(value: Any) -> None:
    for name, field in value.items() if isinstance(value, dict) else [("body", value)]:
        try:
            f"{name}{json.dumps(field, ensure_ascii=False)}".encode()
        except UnicodeEncodeError:
            where = name.encode("ascii", "replace").decode()[:80]
            raise BadRequest(f"{where!r} has a lone surrogate, which is not a character", param=where) from None
