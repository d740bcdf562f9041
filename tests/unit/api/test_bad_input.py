"""Whatever is sent, the answer is an OpenAI error that names the field, and the service goes on."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deployments.settings import ApiSettings
from tests.fakes.dispatcher import Script
from tests.unit.api.conftest import Api
from tests.unit.api.test_chat import CHAT, TALK, asking

BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": ["hi"]}, "messages[0]"),
    ({"messages": [{"content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    ({"messages": [*TALK, {"role": "user", "content": 5}]}, "messages[1].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "x", "mood": "good"}]}, "messages[0].mood"),
    ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
    ({"model": None}, "model"),
    ({"model": ""}, "model"),
    ({"model": 5}, "model"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "0.7"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": 10**400}, "temperature"),
    ({"top_p": 1.01}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"frequency_penalty": 3}, "frequency_penalty"),
    ({"presence_penalty": -3}, "presence_penalty"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"max_tokens": 5.0}, "max_tokens"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
    ({"min_tokens": 6, "max_tokens": 5}, "min_tokens"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"seed": 2**64}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", ""]}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": 5}, "stop"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    ({"stream": True, "stream_options": {"colour": 1}}, "stream_options.colour"),
    ({"logit_bias": {"x": 1}}, "logit_bias.x"),
    ({"logit_bias": {"01": 1}}, "logit_bias.01"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5"),
    ({"logit_bias": {"99999": 1}}, "logit_bias"),
    ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": 1}, "logprobs"),
    ({"user": 5}, "user"),
    ({"user": "x" * 513}, "user"),
    ({"priority": "high"}, "priority"),
    ({"priority": 0.5}, "priority"),
    ({"priority": 2**31}, "priority"),
    ({"temprature": 1}, "temprature"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"functions": [{}]}, "functions"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"audio": {}}, "audio"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"store": True}, "store"),
    ({"store": 0}, "store"),
    ({"service_tier": "flex"}, "service_tier"),
    ({"reasoning_effort": "low"}, "reasoning_effort"),
    ({"web_search_options": {}}, "web_search_options"),
    ({"prediction": {"type": "content"}}, "prediction"),
]


@pytest.mark.parametrize(("fields", "param"), BAD_FIELDS, ids=lambda value: str(value)[:50])
async def test_a_bad_field_is_named(api: Api, fields: dict[str, Any], param: str) -> None:
    answer = await api.post(CHAT, json=asking(**fields))
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error")
    assert param.split(".")[-1].split("[")[0] in error["message"]
    assert error["code"]
    assert not api.dispatcher.requests


NO_OPS: list[dict[str, Any]] = [
    {"n": 1}, {"logprobs": False}, {"response_format": {"type": "text"}}, {"store": False}, {"user": "me"},
    {"metadata": {"a": "b"}}, {"service_tier": "auto"}, {"service_tier": "default"}, {"parallel_tool_calls": True},
    {"tools": []}, {"tools": None}, {"tool_choice": "none"}, {"tool_choice": "auto"}, {"functions": []},
    {"top_logprobs": None}, {"top_logprobs": 0}, {"modalities": ["text"]}, {"reasoning_effort": None},
    {"seed": None}, {"stop": None}, {"stop": []}, {"stop": ["x"] * 16}, {"safety_identifier": "x"},
    {"prompt_cache_key": "x"}, {"stream_options": None}, {"stream_options": {"include_usage": False}},
    {"stream_options": {"include_usage": None, "include_obfuscation": False}}, {"temperature": None},
    {"max_tokens": None, "max_completion_tokens": 5}, {"logit_bias": None}, {"logit_bias": {}}, {"audio": None},
    {"something_of_a_client": None},
    {"messages": [{"role": "user", "content": "hi", "name": "Ann"}]},
    {"messages": [{"role": "assistant", "content": "x", "refusal": None, "tool_calls": [], "audio": None}, *TALK]},
    {"messages": [{"role": "user", "content": []}]},
]  # fmt: skip


@pytest.mark.parametrize("fields", NO_OPS, ids=lambda value: str(value)[:50])
async def test_a_value_that_asks_for_nothing_is_accepted(api: Api, fields: dict[str, Any]) -> None:
    assert (await api.post(CHAT, json=asking(**fields))).status_code == 200


def with_raw(value: str) -> bytes:
    return json.dumps(asking(temperature="HERE")).replace('"HERE"', value).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"\xff\xfe{}",
        b"\xef\xbb\xbf{}",
        with_raw("NaN"),
        with_raw("Infinity"),
        with_raw("-Infinity"),
        with_raw("1e999"),
        with_raw("9" * 5000),
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"messages": ' + b"[" * 900 + b"]" * 900 + b"}",
    ],
    ids=lambda content: repr(content[:30]),
)
async def test_what_is_not_json(api: Api, content: bytes) -> None:
    answer = await api.post(CHAT, content=content)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert (await api.post(CHAT, json=asking())).status_code == 200


@pytest.mark.parametrize("text", [r"\ud800", r"\uDFFF", r"\ud83d x"])
async def test_lone_surrogates(api: Api, text: str) -> None:
    content = json.dumps(asking()).replace('"hi"', f'"{text}"').encode()
    answer = await api.post(CHAT, content=content)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")


async def test_a_surrogate_pair_is_a_character(api: Api) -> None:
    content = json.dumps(asking(messages=[{"role": "user", "content": "😀"}])).encode()
    assert b"\\ud83d" in content
    assert (await api.post(CHAT, content=content)).status_code == 200


async def test_unknown_model(api: Api) -> None:
    answer = await api.post(CHAT, json=asking(model="gpt-9"))
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert "tiny" in error["message"]


async def test_body_over_the_limit(make_api: Callable[..., Api], speak: Callable[..., Script]) -> None:
    api = make_api(speak("x"), ApiSettings(max_body_bytes=1024))
    big = json.dumps(asking(user="x" * 2000)).encode()

    async def pieces() -> AsyncIterator[bytes]:
        for i in range(0, len(big), 100):
            yield big[i : i + 100]

    declared = await api.post(CHAT, content=big)
    chunked = await api.post(CHAT, content=pieces())
    for answer in (declared, chunked):
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
        assert "1,024 bytes" in answer.json()["error"]["message"]
    assert (await api.post(CHAT, json=asking())).status_code == 200


async def test_unknown_path_and_wrong_method(api: Api) -> None:
    unknown = await api.get("/v1/embeddings")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "not_found")
    wrong = await api.get(CHAT)
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")
    assert "POST" in wrong.headers["allow"]
    async with api.client() as client:
        assert (await client.options(CHAT)).status_code == 204
        assert (await client.head("/health")).status_code == 200


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
known_names = st.sampled_from(sorted({name for fields, _ in BAD_FIELDS for name in fields} | {"prompt", "best_of"}))


@given(path=st.sampled_from([CHAT, "/v1/completions"]), fields=st.dictionaries(known_names, json_values, max_size=4))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_no_body_is_our_mistake(api: Api, path: str, fields: dict[str, Any]) -> None:
    base: dict[str, Any] = {"model": "tiny", **({"messages": TALK} if path == CHAT else {"prompt": "x"})}
    answer = await api.post(path, content=json.dumps({**base, **fields}).encode())
    assert answer.status_code in (200, 400, 404)
    if answer.status_code != 200:
        assert answer.json()["error"]["message"]
