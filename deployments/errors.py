"""The exception tree, and its one table to HTTP.

    HeadroomError
    ├── ConfigError                 ends a start: one line, exit code 2
    └── RequestError                one request failed; carries OpenAI's `param` and `code`
        ├── BadRequest              400
        │   ├── ContextLengthExceeded
        │   └── UnsupportedField
        ├── Unauthorized            401
        ├── Forbidden               403
        ├── ModelNotFound           404
        ├── RequestTimeout          408
        │   └── BodyTimeout
        ├── BodyTooLarge            413
        ├── Overloaded              429, with Retry-After
        │   └── KeyLimitExceeded
        ├── EngineFailed            500
        └── NoReplica               503

A message states what was needed, what was there, and which knob to turn.
"""

from __future__ import annotations

from dataclasses import dataclass


class HeadroomError(Exception):
    """Base of every error that Headroom raises on purpose."""


class ConfigError(HeadroomError):
    """The configuration, the machine or the model does not allow a start. `str()` is one line."""


class RequestError(HeadroomError):
    """One request failed; the service goes on.

    Args:
        message: for the client; one or two sentences.
        param: the body field at fault, as OpenAI names it ("messages", "temperature"), or None.
        code: a machine-readable reason; the class's default when None.
        retry_after_s: seconds after which a retry may succeed; becomes the Retry-After header.
    """

    default_code: str | None = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code if code is not None else self.default_code
        self.retry_after_s = retry_after_s


class BadRequest(RequestError):
    """The body can't be served as it is."""

    default_code = "invalid_value"


class ContextLengthExceeded(BadRequest):
    """Prompt and output are longer than the model's context or any replica's capacity."""

    default_code = "context_length_exceeded"


class UnsupportedField(BadRequest):
    """A field or value of OpenAI's API that Headroom does not serve yet."""

    default_code = "unsupported_parameter"


class Unauthorized(RequestError):
    """The API key is missing or unknown."""

    default_code = "invalid_api_key"


class Forbidden(RequestError):
    """The API key is known, and not for this endpoint."""

    default_code = "insufficient_role"


class ModelNotFound(RequestError):
    """No model of that name or alias is served."""

    default_code = "model_not_found"


class RequestTimeout(RequestError):
    """The last token was not there `api.request_timeout_s` after the request's arrival."""

    default_code = "request_timeout"


class BodyTimeout(RequestTimeout):
    """The request's body was not there `api.body_timeout_s` after its head."""

    default_code = "body_timeout"


class BodyTooLarge(RequestError):
    """The request body is over `api.max_body_bytes`."""

    default_code = "request_too_large"


class Overloaded(RequestError):
    """The waiting queue is full, or the deadline passed before blocks were free."""

    default_code = "rate_limit_exceeded"


class KeyLimitExceeded(Overloaded):
    """A limit of the API key is reached."""

    default_code = "key_limit_exceeded"


class EngineFailed(RequestError):
    """The engine or its replica failed while the request was with it."""

    default_code = "engine_failed"


class NoReplica(RequestError):
    """No replica of the model is alive and ready."""

    default_code = "no_replica"


@dataclass(frozen=True, slots=True)
class HttpStatus:
    """HTTP status and OpenAI error `type` of an exception class."""

    status: int
    type: str


HTTP: dict[type[RequestError], HttpStatus] = {
    BadRequest: HttpStatus(400, "invalid_request_error"),
    Unauthorized: HttpStatus(401, "authentication_error"),
    Forbidden: HttpStatus(403, "permission_error"),
    ModelNotFound: HttpStatus(404, "invalid_request_error"),
    RequestTimeout: HttpStatus(408, "timeout_error"),
    BodyTooLarge: HttpStatus(413, "invalid_request_error"),
    Overloaded: HttpStatus(429, "rate_limit_error"),
    EngineFailed: HttpStatus(500, "server_error"),
    NoReplica: HttpStatus(503, "server_error"),
}
"""Looked up along the class's ancestors, so a subclass answers as its parent unless listed."""


def http_status(error: RequestError) -> HttpStatus:
    """The table's row for the nearest listed ancestor of `error`'s class; 500 for a bare RequestError."""
    for ancestor in type(error).__mro__:
        if issubclass(ancestor, RequestError) and ancestor in HTTP:
            return HTTP[ancestor]
    return HttpStatus(500, "server_error")
