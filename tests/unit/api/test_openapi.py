"""`/openapi.json` says what is true: schemathesis sends what it describes, and what it does not.

300 cases by default; `HEADROOM_API_CASES=2000` in the environment for more.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

from deployments.api.openapi import document
from deployments.settings import ApiSettings
from tests.fakes.dispatcher import Script
from tests.unit.api.conftest import Api
from tests.unit.api.test_bad_input import BAD_FIELDS, NO_OPS
from tests.unit.api.test_chat import CHAT, asking

CASES = int(os.environ.get("HEADROOM_API_CASES", "300"))
HANG_S = 60
DOCUMENT = document("1.2.3", keyed=False, admin_keyed=False)
SCHEMA = schemathesis.openapi.from_dict({**DOCUMENT, "servers": [{"url": "http://test"}]})
OPERATIONS = [found.ok() for found in SCHEMA.get_all_operations()]
POSTED = [operation for operation in OPERATIONS if operation.method == "post"]
CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
]


@pytest.fixture
def loop() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


async def send(api: Api, case: Any) -> httpx.Response:
    """What a case is answered.

    Raises:
        TimeoutError: it hangs.
    """
    sent = case.as_transport_kwargs(base_url="http://test")
    request = {key: sent[key] for key in ("method", "url", "headers", "params", "json", "data") if sent.get(key)}
    if isinstance(request.get("data"), (bytes, str)):
        request["content"] = request.pop("data")
    if isinstance(case.body, (dict, list)) and not case.body:
        request["json"] = case.body
    async with asyncio.timeout(HANG_S):
        return await _sent(api, request)


async def _sent(api: Api, request: dict[str, Any]) -> httpx.Response:
    async with api.client() as client:
        return await client.request(**request)


BETWEEN_FIELDS = ("stream_options", "top_logprobs", "min_tokens", "max_tokens", "logit_bias")
"""Fields that one rule or another holds against other fields, or against the model."""


def chat_errors(body: dict[str, Any]) -> list[Any]:
    schema = {"$ref": "#/components/schemas/ChatBody", "components": DOCUMENT["components"]}
    return list(Draft202012Validator(schema).iter_errors(body))


@pytest.mark.parametrize("fields", NO_OPS, ids=lambda value: str(value)[:50])
def test_the_schema_accepts_what_asks_for_nothing(fields: dict[str, Any]) -> None:
    assert not chat_errors(asking(**fields))


@pytest.mark.parametrize(("fields", "param"), BAD_FIELDS, ids=lambda value: str(value)[:50])
def test_the_schema_refuses_what_is_refused(fields: dict[str, Any], param: str) -> None:
    assert chat_errors(asking(**fields)) or param in BETWEEN_FIELDS


async def test_the_document_and_its_routes(make_api: Callable[..., Api]) -> None:
    api = make_api(Script(), ApiSettings(api_keys_env="K"), environment={"K": "k"})
    made = (await api.get("/openapi.json")).json()
    assert made["servers"] == [{"url": "/"}]
    routes = {(r.path.replace(":path", ""), m) for r in api.app.routes for m in r.methods}  # type: ignore[attr-defined]  # all are Routes
    described = {(path, method.upper()) for path, methods in made["paths"].items() for method in methods}
    assert described == {(path, method) for path, method in routes if method != "HEAD"}
    Draft202012Validator.check_schema(made["components"]["schemas"])
    keyed = {path for path, methods in made["paths"].items() for method in methods.values() if method["security"]}
    for path, methods in made["paths"].items():
        if "get" in methods:
            assert ((await api.get(path)).status_code == 401) == (path in keyed)
    api_paths = {"/v1/models", "/v1/models/{model}", "/v1/chat/completions", "/v1/completions"}
    assert keyed == api_paths | {"/metrics", "/fleet/state"}
    assert not [m for methods in DOCUMENT["paths"].values() for m in methods.values() if m["security"]]


def test_schemathesis(make_api: Callable[..., Api], speak: Callable[..., Script], loop: asyncio.Runner) -> None:
    """No 5xx, no hang, no answer but those described, and nothing accepted that the schemas refuse."""
    api = make_api(speak("hello world", logprobs=True))
    seen: Counter[tuple[str, int]] = Counter()
    modes = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)
    every = settings(
        max_examples=CASES,
        deadline=None,
        database=None,
        derandomize=CASES == 300,
        suppress_health_check=list(HealthCheck),
    )

    def send_case(case: Any) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = "tiny"
        response = loop.run(send(api, case))
        seen[case.path, response.status_code] += 1
        case.validate_response(response, checks=CHECKS)

    posted = st.one_of(*(operation.as_strategy(mode) for operation in POSTED for mode in modes))
    every(given(case=posted)(send_case))()
    for operation in OPERATIONS:
        if operation not in POSTED:
            settings(every, max_examples=10)(given(case=operation.as_strategy(modes[0]))(send_case))()
    assert {(operation.path, status) for operation in POSTED for status in (200, 400)} <= set(seen)
    assert {path for path, _ in seen} == set(DOCUMENT["paths"])
    assert not api.dispatcher.running
    assert loop.run(api.post(CHAT, json=asking())).status_code == 200
