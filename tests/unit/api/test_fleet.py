"""The fleet page's two routes."""

from __future__ import annotations

import base64
import hashlib
import logging
import re
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import pytest

from deployments.settings import ApiSettings
from tests.fakes.dispatcher import Script
from tests.unit.api.conftest import Api
from tests.unit.api.test_metrics import values
from tests.unit.fleet.scenes import ONE


class Parts(HTMLParser):
    """What stands in the page's script and style, and every address that it names."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.inside: dict[str, str] = {}
        self.addresses: list[str] = []
        self._tag = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, Any]]) -> None:
        self._tag = tag
        self.addresses += [value for name, value in attrs if name in ("src", "href", "action")]
        assert not [name for name, _ in attrs if name.startswith("on") or name == "style"], "the policy forbids them"

    def handle_endtag(self, _: str) -> None:
        self._tag = ""

    def handle_data(self, data: str) -> None:
        if self._tag in ("script", "style"):
            self.inside[self._tag] = self.inside.get(self._tag, "") + data


async def test_the_page_brings_all_it_needs_and_its_policy_lets_nothing_else_in(api: Api) -> None:
    answer = await api.get("/fleet")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    parts = Parts(answer.text)
    for tag in ("script", "style"):
        digest = base64.b64encode(hashlib.sha256(parts.inside[tag].encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert (policy["default-src"], policy["connect-src"]) == ("'none'", "'self'")
    assert parts.addresses == ["data:,", "fleet/state"]
    assert not re.search(r"https?://|@import|url\(", answer.text)


async def test_the_state_is_what_the_ledgers_say(api: Api) -> None:
    unknown = (await api.get("/fleet/state")).json()["models"]
    assert [(model["name"], model["ledger"]) for model in unknown] == [("tiny", "unknown")]


async def test_the_state_has_the_replicas(make_api: Callable[..., Api]) -> None:
    api = make_api(Script())
    api.dispatcher.observation = ONE["llama-8b"]
    answer = await api.get("/fleet/state")
    assert answer.headers["cache-control"] == "no-store"
    (model,) = answer.json()["models"]
    assert model["ledger"] == "up"
    assert model["replicas"][0]["kv"]["held_blocks"] == 220
    assert model["replicas"][0]["plan"]["devices"][0]["name"] == "24 GB card"


async def test_the_state_asks_for_a_key_where_one_is_set(make_api: Callable[..., Api]) -> None:
    api = make_api(Script(), ApiSettings(api_keys_env="KEYS"), environment={"KEYS": "sesame"})
    assert (await api.get("/fleet/state")).status_code == 401
    assert (await api.get("/fleet/state", headers={"authorization": "Bearer sesame"})).status_code == 200


async def test_polling_is_neither_logged_nor_counted(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "headroom.access"):
        await api.get("/fleet/state")
    assert caplog.records == []
    assert values((await api.get("/metrics")).text, "headroom_requests_total") == {}


@pytest.mark.parametrize("path", ["/fleet", "/fleet/state"])
async def test_only_reading(api: Api, path: str) -> None:
    assert (await api.post(path)).status_code == 405
