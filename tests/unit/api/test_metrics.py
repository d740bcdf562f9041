"""What the API counts, and its page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from deployments.errors import Overloaded
from deployments.metrics.board import Board
from deployments.protocol import IngressNotice
from deployments.settings import ApiSettings
from tests.fakes.dispatcher import Script
from tests.unit.api.conftest import Api
from tests.unit.metrics.samples import VIEW, ingress_vitals


async def page_after(api: Api, *requests: tuple[str, dict[str, Any]]) -> str:
    async with api.client() as client:
        for path, body in requests:
            await client.post(path, json=body)
        return (await client.get("/metrics")).text


def values(page: str, metric: str) -> dict[str, float]:
    """The last label's value -> the sample's."""
    found = [line for line in page.splitlines() if line.startswith(metric + "{")]
    return {line.split('="')[-1].split('"')[0]: float(line.rsplit(" ", 1)[1]) for line in found}


async def test_requests_are_counted_by_how_they_ended(
    make_api: Callable[..., Api], speak: Callable[..., Script]
) -> None:
    def script(request: Any) -> Script:
        full = request.sampling.max_tokens == 99
        return Script(refusal=Overloaded("full", retry_after_s=1)) if full else speak("hello world")

    good = {"model": "tiny", "prompt": "hi"}
    page = await page_after(
        make_api(script),
        ("/v1/completions", good),
        ("/v1/completions", {**good, "stream": True}),
        ("/v1/completions", {**good, "max_tokens": 99}),
        ("/v1/completions", {**good, "model": "huge"}),
        ("/v1/nothing", {}),
    )
    outcomes = values(page, "headroom_requests_total")
    assert outcomes == {"ok": 2, "rate_limit_exceeded": 1, "model_not_found": 1, "http_404": 1}
    tokens = len(speak("hello world").chunks)
    assert list(values(page, "headroom_time_to_first_token_seconds_count").values()) == [2]
    assert list(values(page, "headroom_queue_seconds_count").values()) == [2]
    assert list(values(page, "headroom_inter_token_seconds_count").values()) == [2 * (tokens - 1)]


async def test_what_is_wrong_with_a_request_counts_as_the_models_that_it_named(api: Api) -> None:
    page = await page_after(
        api,
        ("/v1/completions", {"model": "gpt-tiny", "prompt": "hi", "max_tokens": 10_000}),
        ("/v1/completions", {"model": "huge", "prompt": "hi"}),
    )
    counted = [line for line in page.splitlines() if line.startswith("headroom_requests_total{")]
    assert ['model="tiny",outcome="context_length_exceeded"' in line for line in counted].count(True) == 1
    assert ['model="",outcome="model_not_found"' in line for line in counted].count(True) == 1


async def test_counters_of_an_ingress_never_go_back(api: Api) -> None:
    """Its own counts are newer than the ledger's, and are not shown in their place while it does not answer."""
    async with api.client() as client:

        async def counted() -> dict[str, float]:
            await client.post("/v1/completions", json={"model": "tiny", "prompt": "hi"})
            return values((await client.get("/metrics")).text, "headroom_requests_total")

        shown = [await counted()]
        told = Board()
        told.hear_ingress(IngressNotice("i1", vitals=ingress_vitals("i1")), 0.0)
        for ledger in (told.observe(VIEW, 1, 0.0), None, told.observe(VIEW, 1, 0.0)):
            api.dispatcher.observation = ledger
            shown.append(await counted())
    assert shown == [{"ok": 1}, {"ok": 3, "invalid_api_key": 1}, {}, {"ok": 3, "invalid_api_key": 1}]


async def test_an_ingress_that_told_its_ledger_shows_the_ledgers_counts_alone(api: Api) -> None:
    """Its first page may be asked for while the ledger hangs, which then shows older ones."""
    async with api.client() as client:
        await client.post("/v1/completions", json={"model": "tiny", "prompt": "hi"})
        api.dispatcher.ledger_answered = True
        assert values((await client.get("/metrics")).text, "headroom_requests_total") == {}


async def test_probes_and_the_page_itself_are_not_counted(api: Api) -> None:
    async with api.client() as client:
        for path in ("/health", "/ready", "/metrics"):
            await client.get(path)
        assert values((await client.get("/metrics")).text, "headroom_requests_total") == {}


async def test_the_page_asks_for_a_key_where_one_is_set(make_api: Callable[..., Api]) -> None:
    api = make_api(Script(), ApiSettings(api_keys_env="KEYS"), environment={"KEYS": "sesame"})
    assert (await api.get("/metrics")).status_code == 401
    assert (await api.get("/v1/models")).status_code == 401
    answer = await api.get("/metrics", headers={"authorization": "Bearer sesame"})
    assert answer.status_code == 200
    assert values(answer.text, "headroom_requests_total") == {"invalid_api_key": 2}


@pytest.mark.parametrize("accept", ["text/plain;version=abc", "application/openmetrics-text;version=1..0", "*/*", ""])
async def test_the_page_is_there_whatever_is_accepted(api: Api, accept: str) -> None:
    answer = await api.get("/metrics", headers={"accept": accept})
    assert answer.status_code == 200
    assert "# TYPE headroom_requests" in answer.text


async def test_probes_under_a_prefix_are_probes(api: Api) -> None:
    transport = httpx.ASGITransport(app=api.app, root_path="/llm")
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        assert [(await client.get(f"/llm/{name}")).status_code for name in ("health", "ready", "metrics")] == [200] * 3
        assert values((await client.get("/llm/metrics")).text, "headroom_requests_total") == {}
