"""Request bodies, as OpenAI defines them, with the sampling extensions that the field has settled on.

Types are strict: "0.7" is not a temperature, and true is not 1. Null means default everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema
from pydantic_core import PydanticCustomError

from deployments.api import fields
from deployments.errors import BadRequest, UnsupportedField

MAX_STOPS = 16
MAX_STOP_LENGTH = 1024
"""Characters: each choice builds its own table of every stop string, while others wait."""
MAX_CHOICES = 128
MAX_TOP_LOGPROBS = 20
MAX_LOGIT_BIASES = 1024
MAX_USER = 512
MAX_POOL = 256
_MOST = 2**31 - 1

Prompt = str | tuple[int, ...]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


def _no_ops(table: fields.NoOps) -> BeforeValidator:
    def drop(value: Any) -> Any:
        return fields.drop_no_ops(value, table, path="stream_options.") if isinstance(value, dict) else value

    return BeforeValidator(drop)


def _read_stop(value: Any) -> Any:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise PydanticCustomError("stop", "must be a string or a list of strings, none of them empty")
    if len(stops) > MAX_STOPS:
        raise PydanticCustomError(
            "stop", "has {count} strings; at most {most}", {"count": len(stops), "most": MAX_STOPS}
        )
    if (longest := max(map(len, stops), default=0)) > MAX_STOP_LENGTH:
        raise PydanticCustomError(
            "stop",
            "has a string of {count} characters; at most {most}",
            {"count": longest, "most": MAX_STOP_LENGTH},
        )
    return tuple(stops)


def _read_prompt(value: Any) -> Any:
    if isinstance(value, str) or _is_ids(value):
        return (value,) if isinstance(value, str) else (tuple(value),)
    if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
        return tuple(value)
    if isinstance(value, list) and value and all(_is_ids(one) for one in value):
        return tuple(tuple(one) for one in value)
    raise PydanticCustomError(
        "prompt", "must be a string, a list of strings, a list of token ids or a list of such lists, and not empty"
    )


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(one) is int for one in value)


def _read_content(value: Any) -> Any:
    """A string, or text parts joined by newlines."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise PydanticCustomError("content", "must be a string or a list of text parts")
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            name = kind if isinstance(kind, str) else "unknown"
            raise PydanticCustomError(
                "content_part", "has a part of type {type!r}; only 'text' is supported", {"type": name[:40]}
            )
        if not isinstance(part.get("text"), str):
            raise PydanticCustomError("content", "has a text part whose 'text' is not a string")
    return "\n".join(part["text"] for part in value)


_STOP: dict[str, Any] = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH}
_IDS: dict[str, Any] = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
# What clients may send, for the OpenAPI document; the types of the fields are what the validators make of it.
_SENT_STOP = WithJsonSchema({"anyOf": [_STOP, {"type": "array", "items": _STOP, "maxItems": MAX_STOPS}]})
_SENT_PROMPT = WithJsonSchema(
    {
        "anyOf": [
            {"type": "string"},
            {"type": "array", "items": {"type": "string"}, "minItems": 1},
            _IDS,
            {"type": "array", "items": _IDS, "minItems": 1},
        ]
    }
)
_SENT_CONTENT = WithJsonSchema(
    {
        "anyOf": [
            {"type": "string"},
            {
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                    "required": ["type", "text"],
                },
            },
        ]
    }
)


class StreamOptions(_Strict):
    include_usage: bool = False


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str, BeforeValidator(_read_content), _SENT_CONTENT]
    name: str | None = None
    tool_call_id: str | None = None

    def rendered(self) -> dict[str, str]:
        """What the chat template sees; a developer is a system."""
        values = {
            "role": "system" if self.role == "developer" else self.role,
            "content": self.content,
            "name": self.name,
            "tool_call_id": self.tool_call_id,
        }
        return {name: value for name, value in values.items() if value is not None}


class GenerationBody(_Strict):
    """What both endpoints take."""

    model: Annotated[str, Field(min_length=1)]
    stream: bool = False
    stream_options: Annotated[StreamOptions | None, _no_ops(fields.STREAM_OPTIONS)] = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    max_tokens: Annotated[int, Field(ge=1, le=_MOST)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=_MOST)] = 0
    ignore_eos: bool = False
    stop: Annotated[tuple[str, ...], BeforeValidator(_read_stop), _SENT_STOP] = ()
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, le=_MOST)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    logit_bias: Annotated[
        dict[Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,8})$")], Annotated[float, Field(ge=-100, le=100)]],
        Field(max_length=MAX_LOGIT_BIASES),
    ] = {}
    priority: Annotated[int, Field(ge=-_MOST, le=_MOST)] = 0
    """Among the caller's own requests that wait, the lowest is served first."""
    user: Annotated[str, Field(max_length=MAX_USER)] | None = None
    """Who shares the room fairly with others while requests wait, where no API keys tell callers apart."""
    pool: Annotated[str, Field(min_length=1, max_length=MAX_POOL)] | None = None
    """Insists on one of the model's pools; default: any that has room."""
    # Hints, which change no answer.
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of token counts."""
        return self.stream_options is not None and self.stream_options.include_usage


class ChatBody(GenerationBody):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=_MOST)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] = 0


class CompletionBody(GenerationBody):
    prompt: Annotated[tuple[Prompt, ...], BeforeValidator(_read_prompt), _SENT_PROMPT]
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None


def parse_chat(raw: Mapping[str, Any]) -> ChatBody:
    """The body of /v1/chat/completions.

    Raises:
        BadRequest: names the field at fault.
    """
    kept = fields.drop_no_ops(raw, fields.BODY)
    if isinstance(kept.get("messages"), list):
        kept["messages"] = [_tidy_message(i, message) for i, message in enumerate(kept["messages"])]
    body = _validate(ChatBody, kept)
    _check_common(body)
    if body.top_logprobs and not body.logprobs:
        raise BadRequest("'top_logprobs' needs 'logprobs': true", param="top_logprobs")
    if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
        raise BadRequest(
            f"'max_tokens' is {body.max_tokens} and 'max_completion_tokens' {body.max_completion_tokens}: "
            "they mean the same, send one",
            param="max_tokens",
        )
    return body


def parse_completion(raw: Mapping[str, Any]) -> CompletionBody:
    """The body of /v1/completions.

    Raises:
        BadRequest: names the field at fault.
    """
    kept = fields.drop_no_ops(raw, fields.BODY)
    if kept.get("logprobs") is False:
        del kept["logprobs"]
    best_of = kept.pop("best_of", None)
    body = _validate(CompletionBody, kept)
    _check_common(body)
    if best_of is not None and (type(best_of) is not int or best_of != body.n):
        raise UnsupportedField("'best_of' other than 'n' is not supported by this server", param="best_of")
    return body


def _tidy_message(index: int, message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    return fields.drop_no_ops(message, fields.MESSAGE, path=f"messages[{index}].")


def _check_common(body: GenerationBody) -> None:
    if body.include_usage and not body.stream:
        raise BadRequest("'stream_options' needs 'stream': true", param="stream_options")


Body = TypeVar("Body", bound=GenerationBody)


def _validate(body: type[Body], values: dict[str, Any]) -> Body:
    try:
        return body.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise _bad_request(first["type"], first["loc"], first["msg"]) from None


def _bad_request(kind: str, location: tuple[int | str, ...], message: str) -> BadRequest:
    param = ""
    for part in location:
        if part == "[key]":
            continue
        param += f"[{part}]" if isinstance(part, int) else f".{part[:80]}" if param else part[:80]
    if kind == "extra_forbidden":
        return UnsupportedField(
            f"{param!r} is not a field that this server knows", param=param, code="unknown_parameter"
        )
    if kind == "missing":
        return BadRequest(f"{param!r} is required", param=param, code="missing_required_parameter")
    if kind == "content_part":
        return UnsupportedField(f"{param!r} {message}", param=param)
    return BadRequest(f"{param!r}: {message[:1].lower()}{message[1:]}", param=param)
