"""The whole service over HTTP: streams, disconnects, load, dead processes, bad input. Real Ray Serve, real weights."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from typing import Any

import httpx
import openai
import psutil
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from deployments.metrics.catalog import METRICS
from tests.integration.conftest import MODEL, Service
from tests.waiting import wait_for

TIMEOUT = httpx.Timeout(240.0)
UNFINISHED_S = 20.0
"""In this time a request of 4,000 tokens is far from its end: when all is idle by then, it was stopped."""


def body(prompt: str = "Once upon a time", **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": prompt, "temperature": 0, "ignore_eos": True, "max_tokens": 16, **fields}


async def stream(client: httpx.AsyncClient, fields: dict[str, Any]) -> tuple[int, list[dict[str, Any]], bool]:
    """(status, events, whether [DONE] came)."""
    events, done = [], False
    async with client.stream("POST", "/v1/completions", json={**fields, "stream": True}) as response:
        if response.status_code != 200:
            return response.status_code, [json.loads(await response.aread())], False
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                done = True
            elif line.startswith("data: "):
                events.append(json.loads(line.removeprefix("data: ")))
    return 200, events, done


def finish_of(events: list[dict[str, Any]]) -> list[str]:
    return [c["finish_reason"] for e in events for c in e.get("choices", ()) if c["finish_reason"]]


async def test_openai_client_chats(running: Service) -> None:
    async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="none") as client:
        assert (await client.models.list()).data[0].id == MODEL
        messages: Any = [
            {"role": "system", "content": "You answer in one word."},
            {"role": "user", "content": [{"type": "text", "text": "What is the capital of France?"}]},
        ]
        whole = await client.chat.completions.create(model="alias", messages=messages, temperature=0, max_tokens=12)
        parts = await client.chat.completions.create(
            model=MODEL,
            messages=messages,
            temperature=0,
            max_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
        )
        text, usage = "", None
        async for chunk in parts:
            usage = chunk.usage or usage
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
    assert "Paris" in (whole.choices[0].message.content or "")
    assert "Paris" in text
    assert usage is not None
    assert usage.prompt_tokens == whole.usage.prompt_tokens  # type: ignore[union-attr]  # asked for
    assert usage.completion_tokens > 0


async def test_seed_repeats_and_choices_differ(running: Service) -> None:
    async with httpx.AsyncClient(base_url=running.url, timeout=TIMEOUT) as client:
        fields = body(temperature=1.0, seed=7, n=3, max_tokens=12)
        first, second = [(await client.post("/v1/completions", json=fields)).json() for _ in range(2)]
    texts = [choice["text"] for choice in first["choices"]]
    assert len(set(texts)) == 3
    assert [choice["index"] for choice in first["choices"]] == [0, 1, 2]
    assert first["usage"]["completion_tokens"] == second["usage"]["completion_tokens"] == 36


def test_the_metrics_page_has_every_metric_that_a_machine_without_a_gpu_has(running: Service) -> None:
    """With Prometheus reading it: test_prometheus.py."""
    httpx.post(f"{running.url}/v1/completions", json=body(), timeout=TIMEOUT).raise_for_status()
    expected = {metric.name.removesuffix("_total") for metric in METRICS if not metric.name.startswith("headroom_gpu_")}

    def shown() -> set[str]:
        page = httpx.get(f"{running.url}/metrics", headers={"accept": "application/openmetrics-text"}, timeout=TIMEOUT)
        assert page.headers["content-type"].startswith("application/openmetrics-text")
        return {family.name for family in text_string_to_metric_families(page.text) if family.samples}

    wait_for(lambda: shown() == expected, 30.0)  # what processes tell is a second old


async def test_concurrent_streams(running: Service) -> None:
    async with httpx.AsyncClient(base_url=running.url, timeout=TIMEOUT) as client:
        results = await asyncio.gather(*(stream(client, body(f"Story number {i}:")) for i in range(12)))
    for status, events, done in results:
        assert (status, done) == (200, True)
        assert finish_of(events) == ["length"]
    wait_for(running.idle, 30.0)


async def test_a_disconnected_client_frees_its_blocks_at_once(running: Service) -> None:
    wait_for(running.idle, 30.0)
    async with httpx.AsyncClient(base_url=running.url, timeout=TIMEOUT) as client:
        async with client.stream("POST", "/v1/completions", json=body(max_tokens=4000, stream=True)) as response:
            lines = response.aiter_lines()
            for _ in range(6):
                await anext(lines)
            await asyncio.to_thread(wait_for, lambda: not running.idle(), 30.0)
        await asyncio.to_thread(wait_for, running.idle, UNFINISHED_S)
    assert all(status.held_blocks == 0 for status in running.replicas().values())


@pytest.mark.parametrize("gap_s", [0.0, 0.1], ids=["in_one_packet", "body_apart"])
async def test_a_client_that_leaves_before_the_answer_frees_its_blocks(running: Service, gap_s: float) -> None:
    wait_for(running.idle, 30.0)
    content = json.dumps(body(max_tokens=4000)).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: here\r\nContent-Length: {len(content)}\r\n\r\n".encode()
    _, writer = await asyncio.open_connection("127.0.0.1", httpx.URL(running.url).port)
    if gap_s:
        writer.write(head)
        await asyncio.sleep(gap_s)
        head = b""
    writer.write(head + content)
    await asyncio.to_thread(wait_for, lambda: not running.idle(), 30.0)
    writer.close()
    await writer.wait_closed()
    await asyncio.to_thread(wait_for, running.idle, UNFINISHED_S)


async def test_three_hundred_streams(running: Service) -> None:
    limits = httpx.Limits(max_connections=400)
    async with httpx.AsyncClient(base_url=running.url, timeout=TIMEOUT, limits=limits) as client:
        results = await asyncio.gather(*(stream(client, body(f"Number {i} is", max_tokens=6)) for i in range(300)))
    assert [status for status, _, _ in results] == [200] * 300
    assert [finish_of(events) for _, events, _ in results] == [["length"]] * 300
    await asyncio.to_thread(wait_for, running.idle, 3.0)


async def test_headers_that_serve_reads_are_not_the_clients_to_set(running: Service) -> None:
    """Serve answers 500 to an id that is not UTF-8, and 408 at once where the client's timeout has passed."""
    wild = [(b"x-request-id", b"\xff"), (b"x-session-id", b"\xff"), (b"x-request-timeout-seconds", b"0.001")]
    async with httpx.AsyncClient(base_url=running.url, timeout=TIMEOUT) as client:
        for headers in ([one] for one in wild):
            answer = await client.post("/v1/completions", json=body(), headers=headers)
            assert (answer.status_code, len(answer.headers["x-request-id"])) == (200, 36)
        mine = await client.get("/v1/models", headers={"x-request-id": "mine"})
        assert mine.headers.get_list("x-request-id") == ["mine"]
    await asyncio.to_thread(wait_for, running.idle, 30.0)


BAD: list[tuple[str, bytes, int, str | None]] = [
    ("chat/completions", b"{", 400, None),
    ("chat/completions", b'{"model": "smol", "messages": []}', 400, "messages"),
    ("chat/completions", b'{"model": "smol", "messages": "hi"}', 400, "messages"),
    ("chat/completions", b'{"model": "nobody", "messages": [{"role": "user", "content": "x"}]}', 404, "model"),
    ("completions", b'{"model": "smol", "prompt": "x", "temperature": NaN}', 400, None),
    ("completions", b'{"model": "smol", "prompt": "x", "temperature": 9}', 400, "temperature"),
    ("completions", b'{"model": "smol", "prompt": "x", "top_p": -1}', 400, "top_p"),
    ("completions", b'{"model": "smol", "prompt": "x", "max_tokens": 100000}', 400, None),
    ("completions", b'{"model": "smol", "prompt": "x", "suffix": "y"}', 400, "suffix"),
    ("completions", b'{"model": "smol", "prompt": "x", "no_such_field": 1}', 400, "no_such_field"),
    ("completions", b'{"model": "smol", "prompt": [999999999]}', 400, "prompt"),
    ("completions", b'{"model": "smol", "prompt": "' + b"x" * 300_000 + b'"}', 413, None),
    ("completions", b'\xff\xfe{"model"', 400, None),
]


@pytest.mark.parametrize(("path", "content", "status", "param"), BAD, ids=range(len(BAD)))
async def test_bad_input_is_refused_and_nothing_leaks(
    running: Service, path: str, content: bytes, status: int, param: str | None
) -> None:
    async with httpx.AsyncClient(base_url=running.url, timeout=TIMEOUT) as client:
        response = await client.post(f"/v1/{path}", content=content)
        error = response.json()["error"]
        assert response.status_code == status, error
        assert set(error) == {"message", "type", "param", "code"}
        assert param is None or error["param"] == param
        assert response.headers["x-request-id"]
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/ready")).status_code == 200
    assert running.idle()


async def test_the_fleet_page_shows_replicas_at_work(running: Service) -> None:
    async with httpx.AsyncClient(base_url=running.url, timeout=TIMEOUT) as client:
        assert (await client.get("/fleet")).headers["content-type"].startswith("text/html")
        streams = [asyncio.create_task(stream(client, body(f"Saga {i}", max_tokens=2000))) for i in range(8)]
        while True:  # until what replicas tell each second, and their plans each ten, has come
            (model,) = (await client.get("/fleet/state")).json()["models"]
            at_work = [r for r in model["replicas"] if r["plan"] and r["running"] and r["kv"]["held_blocks"]]
            if len(at_work) == 2 and all(r["tokens_per_s"] for r in at_work):
                break
            assert not any(task.done() for task in streams), f"never seen at work: {model}"
            await asyncio.sleep(0.2)
        assert (model["name"], model["ledger"], model["missing_replicas"]) == (MODEL, "up", 0)
        plans = {status.replica_id: status.plan for status in (await asyncio.to_thread(running.replicas)).values()}
        for replica in model["replicas"]:
            assert replica["status"] == "serving"
            (device,) = replica["plan"]["devices"]
            assert device["budget_bytes"] == plans[replica["id"]].stages[0].budget_bytes
            assert sum(part["bytes"] for part in device["parts"]) == device["memory_bytes"]
        for task in streams:
            task.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
    await asyncio.to_thread(wait_for, running.idle, 30.0)


async def test_a_killed_replica_process_ends_its_requests_and_the_service_recovers(running: Service) -> None:
    wait_for(running.idle, 30.0)
    before = await asyncio.to_thread(running.replicas)
    victim = next(iter(before.values()))
    assert victim.engine_pid is not None
    replica = psutil.Process(victim.engine_pid).parent()
    assert replica is not None
    async with httpx.AsyncClient(base_url=running.url, timeout=TIMEOUT) as client:
        streams = [asyncio.create_task(stream(client, body(f"Tale {i}", max_tokens=48))) for i in range(10)]
        await asyncio.sleep(1.0)
        os.kill(replica.pid, signal.SIGKILL)
        results = await asyncio.gather(*streams)
        for status, events, done in results:
            ended_well = done and finish_of(events) == ["length"]
            ended_with_error = not done and "error" in events[-1]
            assert ended_well != ended_with_error, (status, events[-1:], done)
        assert any(done for _, _, done in results), "the other replica's requests go on"
        status, events, done = await stream(client, body())
        assert (status, done) == (200, True), events
    wait_for(lambda: not psutil.pid_exists(victim.engine_pid or 0), 5.0)
    wait_for(lambda: victim.replica_id not in running.replicas(), 120.0)
    wait_for(running.idle, 20.0)  # the ledger keeps a lost replica's promises until none of them can be taken up


async def test_a_killed_engine_is_replaced(running: Service) -> None:
    victim = next(iter((await asyncio.to_thread(running.replicas)).values()))
    assert victim.engine_pid is not None
    async with httpx.AsyncClient(base_url=running.url, timeout=TIMEOUT) as client:
        streams = [asyncio.create_task(stream(client, body(f"Song {i}", max_tokens=48))) for i in range(6)]
        await asyncio.sleep(1.0)
        os.kill(victim.engine_pid, signal.SIGKILL)
        for _, events, done in await asyncio.gather(*streams):
            assert done or "error" in events[-1], events[-1]
    began = time.monotonic()
    wait_for(lambda: victim.replica_id not in running.replicas(), 120.0)
    assert time.monotonic() - began < 120.0
    wait_for(running.idle, 20.0)
