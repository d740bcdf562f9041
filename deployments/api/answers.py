"""JSON Schemas of what is answered, for the OpenAPI document. Answers are written as plain dicts (`formats`)."""

from __future__ import annotations

from typing import Any

from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST as OPEN_METRICS

Json = dict[str, Any]

METRICS_TYPES = tuple(kind.partition(";")[0] for kind in (CONTENT_TYPE_LATEST, OPEN_METRICS))

_STRING: Json = {"type": "string"}
_COUNT: Json = {"type": "integer", "minimum": 0}
_NUMBER: Json = {"type": "number"}


def _object(**properties: Json) -> Json:
    """An object with these properties and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _list(items: Json) -> Json:
    return {"type": "array", "items": items}


def _or_null(schema: Json) -> Json:
    return {"anyOf": [schema, {"type": "null"}]}


_USAGE = _object(
    prompt_tokens=_COUNT,
    completion_tokens=_COUNT,
    total_tokens=_COUNT,
    prompt_tokens_details=_object(cached_tokens=_COUNT),
)
_TOKEN = {"token": _STRING, "logprob": _NUMBER, "bytes": _list({"type": "integer", "minimum": 0, "maximum": 255})}
_CHAT_LOGPROBS = _object(
    content=_list(_object(**_TOKEN, top_logprobs=_list(_object(**_TOKEN)))),
    refusal={"type": "null"},
)
_COMPLETION_LOGPROBS = _object(
    tokens=_list(_STRING),
    token_logprobs=_list(_NUMBER),
    top_logprobs=_list({"type": "object", "additionalProperties": _NUMBER}),
    text_offset=_list(_COUNT),
)


def _answer(kind: str, logprobs: Json, **content: Json) -> Json:
    choice = _object(index=_COUNT, **content, logprobs=_or_null(logprobs), finish_reason={"enum": ["stop", "length"]})
    return _object(
        id=_STRING, object={"const": kind}, created=_COUNT, model=_STRING, choices=_list(choice), usage=_USAGE
    )


_MODEL = _object(
    id=_STRING,
    object={"const": "model"},
    created=_COUNT,
    owned_by={"const": "headroom"},
    root=_STRING,
    max_model_len=_COUNT,
)

SCHEMAS: dict[str, Json] = {
    "ChatAnswer": _answer(
        "chat.completion",
        _CHAT_LOGPROBS,
        message=_object(role={"const": "assistant"}, content=_STRING, refusal={"type": "null"}),
    ),
    "CompletionAnswer": _answer("text_completion", _COMPLETION_LOGPROBS, text=_STRING),
    "Models": _object(object={"const": "list"}, data=_list(_MODEL)),
    "Model": _MODEL,
    "Health": _object(status={"const": "alive"}),
    "Ready": _object(ready={"type": "boolean"}, models={"type": "object", "additionalProperties": {"type": "boolean"}}),
    "Error": _object(
        error=_object(message=_STRING, type=_STRING, param=_or_null(_STRING), code=_or_null(_STRING)),
    ),
}
