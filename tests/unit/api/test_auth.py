"""Key files that change while they are served, roles, and limits, at the endpoints."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.api.auth import REREAD_S, KeyFile, open_gate
from deployments.api.keys import ApiKey, digest, line_of
from deployments.api.limits import Admission
from deployments.errors import ConfigError, NoReplica
from deployments.protocol import GenerationRequest
from deployments.settings import ApiSettings
from tests.fakes.dispatcher import Script
from tests.unit.api.conftest import Api
from tests.unit.api.test_chat import CHAT, asking


def entry(key: str, **more: Any) -> str:
    return line_of(ApiKey(name=key, sha256=digest(key.encode()), **more)) + "\n"


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.yaml"
    path.write_text(entry("alice") + entry("watcher", roles=("admin",)), encoding="utf-8")
    return path


def test_a_changed_file_counts_within_a_second(file: Path) -> None:
    clock = Clock()
    keys = KeyFile(file, clock)
    file.write_text(entry("bob"), encoding="utf-8")
    assert [key.name for key in keys.valid()] == ["alice", "watcher"]
    clock.now = REREAD_S
    assert [key.name for key in keys.valid()] == ["bob"]


def test_kubernetes_swaps_a_symlink(tmp_path: Path) -> None:
    """As the kubelet updates a Secret: keys.yaml -> ..data/keys.yaml, and ..data is replaced by a rename."""
    for version, name in (("1", "alice"), ("2", "bob")):
        (tmp_path / version).mkdir()
        (tmp_path / version / "keys.yaml").write_text(entry(name), encoding="utf-8")
    (tmp_path / "..data").symlink_to("1")
    (tmp_path / "keys.yaml").symlink_to("..data/keys.yaml")
    clock = Clock()
    keys = KeyFile(tmp_path / "keys.yaml", clock)
    (tmp_path / "..new").symlink_to("2")
    os.replace(tmp_path / "..new", tmp_path / "..data")
    clock.now = REREAD_S
    assert [key.name for key in keys.valid()] == ["bob"]


def test_a_broken_file_changes_nothing_and_is_said_once(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    keys = KeyFile(file, clock)
    before, content = keys.valid(), file.read_bytes()
    for step, broken in enumerate([b"- {name: hr-SECRET", None, content], start=1):
        if broken is None:
            file.unlink()
        else:
            file.write_bytes(broken)
        for again in range(3):
            clock.now = step * 10 + again * REREAD_S
            assert keys.valid() == before
    said = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert [level for level, _ in said] == ["ERROR", "ERROR", "WARNING"]
    assert "not YAML at line 1" in said[0][1]
    assert "can't be read" in said[1][1]
    assert "SECRET" not in caplog.text


def test_an_empty_list_locks_everyone_out(file: Path) -> None:
    clock = Clock()
    keys = KeyFile(file, clock)
    file.write_text("[]\n", encoding="utf-8")
    clock.now = REREAD_S
    assert keys.valid() == ()


@pytest.mark.parametrize(("content", "said"), [(None, "can't be read"), ("[]", "has no key"), ("x", "must be a list")])
def test_a_start_without_keys(tmp_path: Path, content: str | None, said: str) -> None:
    path = tmp_path / "keys.yaml"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=said):
        open_gate(ApiSettings(api_keys_file=str(path)), {})


async def test_a_revoked_key(
    make_api: Callable[..., Api], speak: Callable[..., Script], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.api.auth.REREAD_S", 0.0)
    api = make_api(speak("x"), ApiSettings(api_keys_file=str(file)))
    assert (await api.post(CHAT, json=asking(), headers=bearer("alice"))).status_code == 200
    file.write_text(entry("bob"), encoding="utf-8")
    revoked = await api.post(CHAT, json=asking(), headers=bearer("alice"))
    assert (revoked.status_code, revoked.json()["error"]["code"]) == (401, "invalid_api_key")
    assert (await api.post(CHAT, json=asking(), headers=bearer("bob"))).status_code == 200


async def test_roles(make_api: Callable[..., Api], speak: Callable[..., Script], file: Path) -> None:
    api = make_api(speak("x"), ApiSettings(api_keys_file=str(file)))
    for key, chat, models, metrics in (("alice", 200, 200, 403), ("watcher", 403, 403, 200), ("eve", 401, 401, 401)):
        assert (await api.post(CHAT, json=asking(), headers=bearer(key))).status_code == chat
        assert (await api.get("/v1/models", headers=bearer(key))).status_code == models
        assert (await api.get("/metrics", headers=bearer(key))).status_code == metrics
    refused = (await api.get("/metrics", headers=bearer("alice"))).json()["error"]
    assert (refused["type"], refused["code"]) == ("permission_error", "insufficient_role")
    assert "'admin'" in refused["message"]
    assert (await api.get("/metrics")).status_code == 401


async def test_admin_endpoints_may_be_open(make_api: Callable[..., Api], file: Path) -> None:
    api = make_api(Script(), ApiSettings(api_keys_file=str(file), admin_endpoints="open"))
    assert (await api.get("/metrics")).status_code == 200
    assert (await api.get("/v1/models")).status_code == 401


async def test_the_tenant_is_the_keys(
    make_api: Callable[..., Api], speak: Callable[..., Script], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys"
    path.write_text("".join(entry(k, tenant=t) for k, t in (("a", "team"), ("b", "team"))), "utf-8")
    path.write_text(path.read_text("utf-8") + entry("c", weight=3), "utf-8")
    api = make_api(speak("x"), ApiSettings(api_keys_file=str(path), api_keys_env="K"), environment={"K": "plain"})
    caplog.set_level(logging.INFO)
    for key in ("a", "b", "c", "plain"):
        await api.post(CHAT, json=asking(user="me"), headers=bearer(key))
    tenants = [request.tenant for request in api.dispatcher.requests]
    assert tenants[:3] == ["team", "team", "c"]
    assert tenants[3].startswith("key-")
    assert [request.weight for request in api.dispatcher.requests] == [None, None, 3, None]
    salts = [request.salt for request in api.dispatcher.requests]
    assert salts[0] == salts[1]
    assert len(set(salts)) == 3
    lines = [json.loads(r.message) for r in caplog.records if r.name == "headroom.access"]
    assert [line["key"] for line in lines] == ["a", "b", "c", tenants[3]]


def limited(make_api: Callable[..., Api], script: Any, tmp_path: Path, **limits: Any) -> Api:
    path = tmp_path / "keys"
    path.write_text(entry("a", **limits) + entry("b"), encoding="utf-8")
    return make_api(script, ApiSettings(api_keys_file=str(path)))


async def refusal(answer: httpx.Response, said: str) -> int:
    """Seconds that the client is told to wait."""
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["code"]) == (429, "rate_limit_error", "key_limit_exceeded")
    assert said in error["message"]
    return int(answer.headers["retry-after"])


async def test_requests_a_minute(make_api: Callable[..., Api], speak: Callable[..., Script], tmp_path: Path) -> None:
    api = limited(make_api, speak("x"), tmp_path, requests_per_minute=2)
    for body in (asking(), {"bad": "body"}):  # what is refused later counts too
        assert (await api.post(CHAT, json=body, headers=bearer("a"))).status_code in (200, 400)
    wait = await refusal(await api.post(CHAT, json=asking(), headers=bearer("a")), "requests_per_minute of the key 'a'")
    assert 1 <= wait <= 30
    assert (await api.get("/v1/models", headers=bearer("a"))).status_code == 200
    assert (await api.post(CHAT, json=asking(), headers=bearer("b"))).status_code == 200
    assert len(api.dispatcher.requests) == 2


async def test_tokens_a_minute(make_api: Callable[..., Api], speak: Callable[..., Script], tmp_path: Path) -> None:
    api = limited(make_api, speak("hello world"), tmp_path, tokens_per_minute=10)
    used = (await api.post(CHAT, json=asking(), headers=bearer("a"))).json()["usage"]["total_tokens"]
    wait = await refusal(await api.post(CHAT, json=asking(), headers=bearer("a")), "tokens_per_minute of the key 'a'")
    assert abs(wait - (used - 10 + 1) * 6) <= 3


async def test_tokens_of_a_refused_request_are_given_back(make_api: Callable[..., Api], tmp_path: Path) -> None:
    api = limited(make_api, Script(refusal=NoReplica("none")), tmp_path, tokens_per_minute=1)
    for _ in range(3):
        assert (await api.post(CHAT, json=asking(), headers=bearer("a"))).status_code == 503


async def test_what_a_request_is_charged_that_was_taken_up_in_part(
    make_api: Callable[..., Api], speak: Callable[..., Script], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four choices of two prompts; a choice of the second is taken up, and refused is the one after it."""
    charged: list[int] = []
    monkeypatch.setattr(Admission, "leave", lambda _, tokens: charged.append(tokens))

    def script(request: GenerationRequest) -> Script:
        prompt, choice = request.request_id.split("-")[-2:]
        if (prompt, choice) == ("1", "0"):
            return speak("never said", step_s=60.0)
        return Script(refusal=NoReplica("none"), grant_after_s=0.05 if prompt == "1" else 0.1)

    api = limited(make_api, script, tmp_path, tokens_per_minute=100)
    body = {"model": "tiny", "prompt": ["a much longer prompt", "hello"], "n": 2}
    assert (await api.post("/v1/completions", json=body, headers=bearer("a"))).status_code == 503
    assert charged == [len(next(r.prompt_ids for r in api.dispatcher.requests if "-1-" in r.request_id))]


async def test_requests_at_once(make_api: Callable[..., Api], speak: Callable[..., Script], tmp_path: Path) -> None:
    """Counted until the last byte, also of a stream, and whatever ends it."""
    api = limited(make_api, speak("hello world", step_s=0.05), tmp_path, concurrent_requests=2)
    async with api.client() as client:
        running = [
            asyncio.create_task(client.post(CHAT, json=asking(stream=stream), headers=bearer("a")))
            for stream in (True, False)
        ]
        while len(api.dispatcher.requests) < 2:
            await asyncio.sleep(0.01)
        third = await client.post(CHAT, json=asking(), headers=bearer("a"))
        assert await refusal(third, "concurrent_requests of the key 'a' is 2") == 1
        assert (await client.post(CHAT, json=asking(), headers=bearer("b"))).status_code == 200
        assert [(await one).status_code for one in running] == [200, 200]
        for body in (asking(), {"bad": "body"}, asking(), asking()):
            assert (await client.post(CHAT, json=body, headers=bearer("a"))).status_code in (200, 400)
