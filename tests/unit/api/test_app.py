"""What surrounds generation: models, probes, keys, CORS, request ids, the access log, our own mistakes."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import pytest

from deployments.api.access import AccessMiddleware
from deployments.api.app import ServedModel, create_api
from deployments.errors import ConfigError
from deployments.metrics.meter import IngressMeter
from deployments.settings import ApiSettings
from tests.fakes.dispatcher import FakeDispatcher, Script
from tests.unit.api.conftest import Api
from tests.unit.api.test_chat import CHAT, asking, events


async def test_models(api: Api) -> None:
    listed = (await api.get("/v1/models")).json()
    assert listed["object"] == "list"
    assert [card["id"] for card in listed["data"]] == ["tiny", "gpt-tiny", "org/tiny"]
    one = (await api.get("/v1/models/org/tiny")).json()
    assert one == {
        "id": "org/tiny", "object": "model", "created": 1700000000, "owned_by": "headroom", "root": "tiny",
        "max_model_len": 256,
    }  # fmt: skip
    unknown = await api.get("/v1/models/other")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")


async def test_health_and_readiness(api: Api) -> None:
    assert (await api.get("/health")).status_code == 200
    ready = await api.get("/ready")
    assert (ready.status_code, ready.json()) == (200, {"ready": True, "models": {"tiny": True}})
    api.dispatcher.ready = False
    unready = await api.get("/ready")
    assert (unready.status_code, unready.json()) == (503, {"ready": False, "models": {"tiny": False}})
    assert (await api.get("/health")).status_code == 200


async def test_a_dispatcher_that_fails_is_not_ready(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken() -> bool:
        raise RuntimeError("no ledger")

    monkeypatch.setattr(api.dispatcher, "is_ready", broken)
    assert (await api.get("/ready")).status_code == 503


async def test_keys(make_api: Callable[..., Api], speak: Callable[..., Script]) -> None:
    api = make_api(speak("x"), ApiSettings(api_keys_env="KEYS"), environment={"KEYS": "one, two,"})
    for headers, message in [
        ({}, "is needed"),
        ({"authorization": "Bearer wrong"}, "not known"),
        ({"authorization": "Basic one"}, "is needed"),
        ({"authorization": "Bearer one,two"}, "not known"),
        ({"authorization": b"Bearer \xff\xfe"}, "not known"),
    ]:
        answer = await api.post(CHAT, json=asking(), headers=headers)
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        assert message in answer.json()["error"]["message"]
        assert (await api.get("/v1/models", headers=headers)).status_code == 401
    for key in ("one", "two"):
        bearer = {"authorization": f"bearer {key}"}
        assert (await api.post(CHAT, json=asking(user="me"), headers=bearer)).status_code == 200
    assert (await api.get("/health")).status_code == (await api.get("/ready")).status_code == 200
    salts = [request.salt for request in api.dispatcher.requests]
    assert len(set(salts)) == 2
    assert all(salts)
    tenants = {request.tenant for request in api.dispatcher.requests}
    assert len(tenants) == 2
    assert not tenants & {"", "me", "one", "two"}  # a client can't name another tenant, and no key is written down


def test_a_start_without_the_keys_that_are_asked_for() -> None:
    with pytest.raises(ConfigError, match="MISSING"):
        create_api([], ApiSettings(api_keys_env="MISSING"), environment={"MISSING": " , "})


def test_a_name_given_twice(codec: Any) -> None:
    model = ServedModel("a", ("b", "a"), codec, FakeDispatcher(Script()), 10, 0, 1)
    with pytest.raises(ConfigError, match="a is given twice"):
        create_api([model], ApiSettings())


async def test_cors(make_api: Callable[..., Api], speak: Callable[..., Script]) -> None:
    api = make_api(speak("x"), ApiSettings(cors_origins=("https://chat.example",)))
    preflight = {"origin": "https://chat.example", "access-control-request-method": "POST"}
    async with api.client() as client:
        allowed = await client.options(CHAT, headers=preflight)
        assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, "https://chat.example")
        other = await client.options(CHAT, headers={**preflight, "origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers
        answer = await client.post(CHAT, json=asking(), headers={"origin": "https://chat.example"})
        assert answer.headers["access-control-allow-origin"] == "https://chat.example"
        assert "x-request-id" in answer.headers["access-control-expose-headers"]
        refused = await client.post(CHAT, json={}, headers={"origin": "https://chat.example"})
        assert refused.headers["access-control-allow-origin"] == "https://chat.example"


async def test_no_cors_by_default(api: Api) -> None:
    answer = await api.get("/v1/models", headers={"origin": "https://chat.example"})
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/nowhere"])
async def test_every_answer_has_a_request_id(api: Api, path: str) -> None:
    made = await api.get(path)
    assert len(made.headers["x-request-id"]) == 32
    given = await api.get(path, headers={"x-request-id": "my-id.7"})
    assert given.headers["x-request-id"] == "my-id.7"


@pytest.mark.parametrize("wild", ["a b", "x" * 65, "-x", 'a"b', ""])
async def test_a_wild_request_id_is_replaced(api: Api, wild: str) -> None:
    assert len((await api.get("/health", headers={"x-request-id": wild})).headers["x-request-id"]) == 32


async def test_the_request_id_reaches_the_engine_and_stays_unique(api: Api) -> None:
    for _ in range(2):
        await api.post(CHAT, json=asking(n=2), headers={"x-request-id": "mine"})
    ids = [request.request_id for request in api.dispatcher.requests]
    assert all(i.startswith("mine-") for i in ids)
    assert len(set(ids)) == 4


async def test_the_access_log_has_numbers_and_no_text(
    make_api: Callable[..., Api], speak: Callable[..., Script], caplog: pytest.LogCaptureFixture
) -> None:
    api = make_api(speak("SECRET answer"))
    caplog.set_level(logging.DEBUG)
    talk = [{"role": "user", "content": "SECRET question"}]
    for stream in (False, True):
        await api.post(CHAT, json=asking(messages=talk, stream=stream), headers={"x-request-id": "mine"})
    await api.post(CHAT, json=asking(messages=talk, temperature="SECRET"))
    assert "SECRET" not in caplog.text
    lines = [json.loads(r.message) for r in caplog.records if r.name == "headroom.access"]
    assert len(lines) == 3
    for line in lines[:2]:
        assert (line["request_id"], line["model"], line["status"], line["error"]) == ("mine", "tiny", 200, None)
        assert line["prompt_tokens"] == len(api.dispatcher.requests[0].prompt_ids)
        assert line["output_tokens"] == len(api.dispatcher.script.chunks)  # type: ignore[union-attr]  # given
        assert 0 <= line["grant_s"] <= line["first_token_s"] <= line["total_s"]
    assert (lines[2]["status"], lines[2]["error"], lines[2]["output_tokens"]) == (400, "invalid_value", 0)


@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"temperature": "SECRET"}, {"SECRET": 1}, {"stop": "SECRET"}])
async def test_no_log_has_a_prompt_an_answer_or_a_key(
    make_api: Callable[..., Api], speak: Callable[..., Script], caplog: pytest.LogCaptureFixture, fields: dict[str, Any]
) -> None:
    api = make_api(speak("SECRET answer"), ApiSettings(api_keys_env="K"), environment={"K": "SECRET-key"})
    caplog.set_level(logging.DEBUG)
    for key in ("SECRET-key", "SECRET-other"):
        body = {"model": "tiny", "prompt": ["SECRET"], "user": "SECRET", "metadata": {"SECRET": "SECRET"}, **fields}
        await api.post("/v1/completions", json=body, headers={"authorization": f"Bearer {key}"})
    assert "SECRET" not in caplog.text
    assert len([r for r in caplog.records if r.name == "headroom.access"]) == 2


async def test_probes_are_logged_at_debug(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    await api.get("/health")
    assert not [r for r in caplog.records if r.name == "headroom.access"]


@pytest.mark.parametrize("stream", [False, True])
async def test_our_own_mistake(
    make_api: Callable[..., Api], speak: Callable[..., Script], caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    """It is a 500 with an id, or the stream's last event; its message, which may quote a prompt, stays unwritten."""
    api = make_api(Script(speak("abc", finish="length").chunks[:-1], failure=KeyError("SECRET prompt")))
    answer = await api.post(CHAT, json=asking(stream=stream))
    error = events(answer)[-1]["error"] if stream else answer.json()["error"]
    assert (answer.status_code, error["code"]) == (200 if stream else 500, "internal")
    assert "SECRET" not in answer.text
    [record] = [r for r in caplog.records if "failed with KeyError" in r.message]
    assert "fanout.py" in record.message
    assert "SECRET" not in caplog.text
    assert not api.dispatcher.running


async def test_an_answer_that_breaks_off_cuts_the_connection() -> None:
    async def breaking(scope: Any, receive: Any, send: Any) -> None:  # noqa: ARG001
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ValueError("SECRET")

    async def ignore(*_: Any) -> None:
        pass

    scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    with pytest.raises(RuntimeError, match="broke off") as error:
        await AccessMiddleware(breaking, IngressMeter("i"))(scope, ignore, ignore)
    assert "SECRET" not in str(error.value)
