"""The OpenAPI document of `/openapi.json`, from the schemas that requests are read by. Pure.

Rules between fields (`top_logprobs` needs `logprobs`, a prompt must fit the context) are not in it: JSON Schema has no
words for some of them, and the errors name them.
"""

from __future__ import annotations

from typing import Any

from deployments.api import answers, fields
from deployments.api.schemas import ChatBody, CompletionBody, GenerationBody
from deployments.errors import HTTP

Json = dict[str, Any]
_ALWAYS = (401, 403)
_SCHEMA_AT = "#/components/schemas/"


def document(version: str, *, keyed: bool, admin_keyed: bool) -> Json:
    """The document.

    Args:
        version: Headroom's.
        keyed: whether the API's endpoints ask for a key.
        admin_keyed: whether the admin's do.
    """
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Headroom",
            "version": version,
            "description": "Language models behind OpenAI's API. A field that changes nothing may be null.",
        },
        "paths": {
            "/v1/chat/completions": {"post": _generation("chat", "ChatBody", "ChatAnswer", keyed)},
            "/v1/completions": {"post": _generation("completion", "CompletionBody", "CompletionAnswer", keyed)},
            "/v1/models": {"get": _get("listModels", "Every name and alias.", _json("Models"), keyed)},
            "/v1/models/{model}": {
                "get": {
                    **_get("showModel", "One name or alias.", _json("Model"), keyed, errors=(404,)),
                    "parameters": [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}],
                }
            },
            "/health": {"get": _get("health", "This process answers.", _json("Health"))},
            "/ready": {
                "get": _with_answer(
                    _get("ready", "Whether a replica of every model can take work.", _json("Ready")), 503, "Ready"
                )
            },
            "/metrics": {"get": _get("metrics", "For Prometheus.", _texts(*answers.METRICS_TYPES), admin_keyed)},
            "/fleet": {"get": _get("fleet", "The live page; it asks for `/fleet/state`.", _texts("text/html"))},
            "/fleet/state": {"get": _get("fleetState", "What the page shows.", {"application/json": {}}, admin_keyed)},
            "/openapi.json": {"get": _get("openapi", "This document.", {"application/json": {}})},
        },
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": {**_bodies(), **answers.SCHEMAS},
        },
    }


def _generation(name: str, body: str, answer: str, keyed: bool) -> Json:
    errors = sorted({status.status for status in HTTP.values()} - (set() if keyed else set(_ALWAYS)))
    return {
        "operationId": name,
        "requestBody": {"required": True, "content": _json(body)},
        "responses": {
            "200": {
                "description": "The answer; with `stream`, server-sent events of OpenAI's chunks, and [DONE].",
                "content": {**_json(answer), "text/event-stream": {}},
            },
            **{str(status): _error(status) for status in errors},
        },
        "security": [{"key": []}] if keyed else [],
    }


def _get(name: str, meaning: str, content: Json, keyed: bool = False, errors: tuple[int, ...] = ()) -> Json:
    asked = _ALWAYS if keyed else ()
    return {
        "operationId": name,
        "responses": {
            "200": {"description": meaning, "content": content},
            **{str(status): _error(status) for status in sorted((*asked, *errors))},
        },
        "security": [{"key": []}] if keyed else [],
    }


def _with_answer(operation: Json, status: int, schema: str) -> Json:
    responses = {**operation["responses"], str(status): {"description": "Not yet.", "content": _json(schema)}}
    return {**operation, "responses": responses}


def _error(status: int) -> Json:
    names = ", ".join(error.__name__ for error, row in HTTP.items() if row.status == status)
    retry = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}
    return {"description": names, "content": _json("Error"), **({"headers": retry} if status == 429 else {})}


def _json(schema: str) -> Json:
    return {"application/json": {"schema": {"$ref": _SCHEMA_AT + schema}}}


def _texts(*types: str) -> Json:
    return {kind: {"schema": {"type": "string"}} for kind in types}


def _bodies() -> Json:
    """Both bodies and what they are made of, as clients may send them."""
    chat, completion = _body(ChatBody), _body(CompletionBody)
    parts = {**chat.pop("$defs"), **completion.pop("$defs")}
    parts["Message"] = _lenient(parts["Message"], fields.MESSAGE)
    parts["StreamOptions"] = _lenient(parts["StreamOptions"], fields.STREAM_OPTIONS)
    sent = completion["properties"]
    sent["logprobs"] = {"anyOf": [sent["logprobs"], {"const": False}]}
    sent["best_of"] = {"type": ["integer", "null"], "description": "Only the value of n."}
    return {"ChatBody": chat, "CompletionBody": completion, **parts}


def _body(body: type[GenerationBody]) -> Json:
    return _lenient(body.model_json_schema(ref_template=_SCHEMA_AT + "{model}"), fields.BODY)


def _lenient(schema: Json, no_ops: fields.NoOps) -> Json:
    """What `fields.drop_no_ops` lets pass beside the schema: null for every optional field and for any other name, and
    values of OpenAI's fields that ask for nothing."""
    required = schema.get("required", ())
    sent = {
        name: _closed(value) if name in required else _or_null(_closed(value))
        for name, value in schema["properties"].items()
    }
    sent |= {name: {"enum": [None, *values]} for name, values in no_ops.items()}
    return {**schema, "properties": sent, "additionalProperties": {"type": "null"}}


def _closed(schema: Json) -> Json:
    """A map takes no other names than its pattern's."""
    return {**schema, "additionalProperties": False} if "patternProperties" in schema else schema


def _or_null(schema: Json) -> Json:
    if {"type": "null"} in schema.get("anyOf", ()):
        return schema
    default = {"default": schema["default"]} if "default" in schema else {}
    return {"anyOf": [{k: v for k, v in schema.items() if k != "default"}, {"type": "null"}], **default}
