"""What breaks while it serves, and what its clients see of it: nothing, or an error that says so.

One service with two replicas and two ingresses, in float32 so that a token that is computed again is the same token.
HEADROOM_OVERLOAD=10000 sends that many requests beyond capacity instead of 400.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from deployments.app import pool_deployment_name
from deployments.local_ray import INGRESS_DRAINING
from deployments.routing.ledger_deployment import deployment_name
from tests.integration.conftest import MODEL, Service, redeploy, start_service
from tests.integration.stream_client import AT_ONCE, LIMITS, ONE_REQUEST_EACH, TIMEOUT, Answer, stream
from tests.waiting import wait_for

OVERLOAD = int(os.environ.get("HEADROOM_OVERLOAD", "400"))
QUEUE_LIMIT = 60
INGRESS_DRAINING_S = 12
"""Longer than a stream of the rolling update: a HAProxy that Serve replaces knows the old ingress replicas only, and
sends them the next request of each connection that a stream of theirs keeps open."""
LEDGER, POOL, INGRESS = deployment_name(MODEL), pool_deployment_name(MODEL, "default"), "ingress"
KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0, "repetition_penalty": 1.3},
    {"temperature": 0.9, "seed": 5, "frequency_penalty": 0.8, "presence_penalty": 0.3},
    {"temperature": 1.0, "seed": 6, "top_p": 0.9, "logprobs": 1},
]


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory, demo_folder: Path) -> Iterator[Service]:
    pool = {"replicas": 2, "quantization": "fp32", "dtype": "float32", "cpu_device_memory": "800MB"}
    model = {"name": MODEL, "queue_limit": QUEUE_LIMIT, "pools": [pool]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(INGRESS_DRAINING, str(INGRESS_DRAINING_S))
        patch.setenv("RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE", "1")  # `Service.logged` reads what it writes
        with start_service(tmp_path_factory.mktemp("faults"), demo_folder, model, {"replicas": 2}) as service:
            yield service


def body(index: int, max_tokens: int) -> dict[str, Any]:
    kind = KINDS[index % len(KINDS)]
    fields = {"model": MODEL, "prompt": f"Tale number {index}: once", "ignore_eos": True, "max_tokens": max_tokens}
    return fields | kind | {"stream": True}


def clients(service: Service, limits: httpx.Limits = LIMITS) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=service.url, timeout=TIMEOUT, limits=limits)


async def under_load(
    service: Service, fault: Callable[[], Awaitable[None]], *, streams: int, tokens: int
) -> list[Answer]:
    """The answers of streams that run while `fault` happens: it begins when each has had its first tokens."""
    async with clients(service) as client:
        seen: list[list[int]] = [[] for _ in range(streams)]
        work = [asyncio.create_task(stream(client, body(i, tokens), seen[i])) for i in range(streams)]
        while not all(len(events) >= 3 for events in seen):
            await asyncio.sleep(0.05)
            assert not any(task.done() for task in work), "the load ended before the fault"
        await fault()
        return await asyncio.gather(*work)


async def healthy(service: Service) -> None:
    """It serves at once, both replicas take part again, and nothing is held anywhere, by the replicas' own word."""
    async with clients(service) as client:
        assert (await stream(client, body(0, 4))).whole
    await asyncio.to_thread(wait_for, lambda: sum(r.sellable for r in service.ledger().replicas) == 2, 90.0)
    await asyncio.to_thread(wait_for, service.idle, 30.0)
    assert [status.held_blocks for status in (await asyncio.to_thread(service.replicas)).values()] == [0, 0]


@pytest.fixture(scope="module")
def uncut(faulty: Service) -> list[str]:
    """The texts of 8 streams of 40 tokens that nothing disturbs."""

    async def run() -> list[Answer]:
        async with clients(faulty) as client:
            return await asyncio.gather(*(stream(client, body(i, 40)) for i in range(8)))

    answers = asyncio.run(run())
    assert all(answer.whole for answer in answers), answers
    return [answer.text for answer in answers]


def victim(service: Service) -> tuple[psutil.Process, psutil.Process]:
    """(replica, its engine) of one that runs something."""
    status = next(s for s in service.replicas().values() if s.requests)
    engine = psutil.Process(status.engine_pid)
    parent = engine.parent()
    assert parent is not None
    return parent, engine


@pytest.mark.parametrize("which", ["replica", "engine"])
async def test_streams_of_a_killed_process_go_on_with_the_same_tokens(
    faulty: Service, uncut: list[str], which: str
) -> None:
    async def kill() -> None:
        replica, engine = await asyncio.to_thread(victim, faulty)
        (replica if which == "replica" else engine).kill()

    answers = await under_load(faulty, kill, streams=8, tokens=40)
    assert [answer.error for answer in answers] == [None] * 8
    assert all(answer.whole for answer in answers)
    assert [answer.text for answer in answers] == uncut
    await healthy(faulty)


async def test_streams_of_a_frozen_replica_go_on_elsewhere_and_it_comes_back_clean(
    faulty: Service, uncut: list[str]
) -> None:
    frozen: list[psutil.Process] = []

    async def freeze() -> None:
        frozen.append((await asyncio.to_thread(victim, faulty))[0])
        frozen[0].suspend()

    try:
        answers = await under_load(faulty, freeze, streams=8, tokens=40)
    finally:
        for process in frozen:
            process.resume()
    assert [answer.text for answer in answers] == uncut
    assert all(answer.whole for answer in answers)
    await healthy(faulty)


async def what_went_back(service: Service, ended: asyncio.Event) -> list[str]:
    """Counters of processes that live on, which the metrics page showed lower than before; read until `ended`."""
    last: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    fallen = []
    async with clients(service) as client:
        while not ended.is_set():
            page = await client.get("/metrics", headers={"accept": "application/openmetrics-text"})
            for family in text_string_to_metric_families(page.raise_for_status().text):
                for sample in family.samples if family.type in ("counter", "histogram") else ():
                    key = (sample.name, tuple(sorted(sample.labels.items())))
                    if sample.labels.keys() & {"ingress", "replica"}:  # a killed ledger's own begin anew
                        if sample.value < last.get(key, 0.0):
                            fallen.append(f"{key}: {last[key]} -> {sample.value}")
                        last[key] = sample.value
            await asyncio.sleep(0.05)
    assert any(name == "headroom_requests_total" for name, _ in last)
    return fallen


@pytest.mark.parametrize("way", ["killed", "frozen"])
async def test_requests_are_served_while_there_is_no_ledger(faulty: Service, way: str) -> None:
    before = faulty.ledger().epoch
    (ledger,) = faulty.actors(LEDGER)

    async def fault() -> None:
        ledger.kill() if way == "killed" else ledger.suspend()

    async def run() -> list[Answer]:
        running = asyncio.create_task(under_load(faulty, fault, streams=6, tokens=40))
        while psutil.pid_exists(ledger.pid) and ledger.status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE):
            await asyncio.sleep(0.05)
        async with clients(faulty) as client:  # these come when it is gone
            late = await asyncio.gather(*(stream(client, body(i, 8)) for i in range(8)))
        return [*(await running), *late]

    ended = asyncio.Event()
    watch = asyncio.create_task(what_went_back(faulty, ended))
    try:
        answers = await run()
    finally:
        if way == "frozen":
            ledger.resume()
    assert [answer.error for answer in answers] == [None] * 14
    assert all(answer.whole for answer in answers)
    await healthy(faulty)
    ended.set()
    assert await watch == []
    assert (faulty.ledger().epoch > before) == (way == "killed")


async def test_a_killed_ingress_costs_its_own_streams_and_no_block(faulty: Service) -> None:
    doomed = faulty.actors(INGRESS)[0]

    async def kill() -> None:
        doomed.kill()

    answers = await under_load(faulty, kill, streams=12, tokens=40)
    broken = [answer for answer in answers if not answer.whole]
    assert all(answer.error for answer in broken), "a client must see that its answer is not complete"
    assert not any(answer.done for answer in broken)
    assert len(broken) < 12, "the other ingress's streams go on"
    await asyncio.to_thread(wait_for, faulty.idle, 20.0)
    await healthy(faulty)
    await asyncio.to_thread(wait_for, lambda: len(faulty.actors(INGRESS)) == 2, 60.0)


async def test_hundreds_of_clients_that_leave_at_once_leave_nothing(faulty: Service) -> None:
    async with clients(faulty, ONE_REQUEST_EACH) as client:
        work = [asyncio.create_task(stream(client, body(i, 400))) for i in range(500)]
        await asyncio.to_thread(wait_for, lambda: faulty.ledger().waiting > 0, 30.0)
        for task in work:
            task.cancel()
        await asyncio.gather(*work, return_exceptions=True)
    await asyncio.to_thread(wait_for, faulty.idle, 30.0)
    await healthy(faulty)


def all_known_of(service: Service, answers: list[Answer], begun: float) -> str:
    """What their client saw, what the ingress replicas logged, and how often HAProxy saw either side break off."""
    lines = []
    for answer in answers[:20]:
        lines += [answer.history(begun), *(service.logged(answer.request_id) or ["no ingress has logged it"])]
    return "\n".join([*lines, *service.proxy_counts()])


async def test_beyond_capacity_each_request_is_served_or_refused_with_a_time_to_come_back(faulty: Service) -> None:
    at_once = asyncio.Semaphore(AT_ONCE)  # httpx looks at all that wait for a connection whenever one comes free

    async def ask(client: httpx.AsyncClient, index: int) -> Answer:
        async with at_once:
            return await stream(client, body(index, 12))

    async with clients(faulty, ONE_REQUEST_EACH) as client:
        begun = time.monotonic()
        answers = await asyncio.gather(*(ask(client, i) for i in range(OVERLOAD)))
        took_s = time.monotonic() - begun
    refused = [answer for answer in answers if answer.status == 429]
    lost = [answer for answer in answers if answer.status != 429 and not answer.whole]
    assert not lost, f"{len(lost)} lost: {await asyncio.to_thread(all_known_of, faulty, lost, begun)}"
    assert refused
    assert all(int(answer.retry_after or 0) >= 1 for answer in refused)
    full = [answer for answer in refused if "queue_limit" in (answer.error or "")]
    assert full
    overdue = [answer.error for answer in refused if answer not in full]  # on a machine with other work to do
    assert all("within" in (error or "") or "sent nothing for" in (error or "") for error in overdue), overdue
    assert len(answers) - len(refused) >= QUEUE_LIMIT
    known = await asyncio.to_thread(all_known_of, faulty, answers[:1], begun)  # it is there when it is needed
    assert re.search(r"replica_headroom_ingress_\w+\.log: .* POST /v1/completions", known), known
    begun = time.monotonic()
    await healthy(faulty)
    print(
        f"{OVERLOAD} requests in {took_s:.0f} s, {len(refused)} refused; healthy {time.monotonic() - begun:.1f} s later"
    )
    print(known)


def slow_reader(service: Service, index: int) -> socket.socket:
    """A client that has asked for a long answer with log-probabilities, and reads none of it."""
    fields = body(index, 60) | {"logprobs": 5}
    data = json.dumps(fields).encode()
    url = httpx.URL(service.url)
    reader = socket.socket()
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    reader.settimeout(60.0)
    reader.connect((url.host, url.port))
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(data)}\r\n\r\n"
    reader.sendall(head.encode() + data)
    return reader


def read_to_end(reader: socket.socket) -> bytes:
    with reader:
        return b"".join(iter(lambda: reader.recv(65536), b""))


async def test_slow_readers_hold_nobody_up_and_get_all_in_the_end(faulty: Service) -> None:
    before = sum(process.memory_info().rss for process in faulty.actors(INGRESS))
    readers = [await asyncio.to_thread(slow_reader, faulty, index) for index in range(4)]
    await asyncio.to_thread(wait_for, lambda: not faulty.idle(), 30.0)
    async with clients(faulty) as client:
        answers = await asyncio.gather(*(stream(client, body(i, 8)) for i in range(8)))
    assert all(answer.whole for answer in answers)
    await asyncio.to_thread(wait_for, faulty.idle, 180.0)  # though none of them has read a byte
    after = sum(process.memory_info().rss for process in faulty.actors(INGRESS))
    assert after - before < 64 * 2**20
    for answer in await asyncio.gather(*(asyncio.to_thread(read_to_end, reader) for reader in readers)):
        assert b" 200 " in answer[:20]
        assert answer.count(b"data: [DONE]") == 1
        assert answer.count(b'"finish_reason":"length"') + answer.count(b'"finish_reason": "length"') == 1
    await healthy(faulty)


async def test_a_rolling_update_loses_no_request(faulty: Service) -> None:
    old = set((await asyncio.to_thread(faulty.replicas)).keys())
    config = yaml.safe_load(faulty.config.read_text(encoding="utf-8"))
    config["applications"][0]["args"]["models"][0]["pools"][0]["max_sequences"] = 128
    faulty.config.write_text(yaml.safe_dump(config), encoding="utf-8")
    updated = asyncio.Event()
    answers: list[Answer] = []

    async def ask(client: httpx.AsyncClient, number: int) -> None:
        while not updated.is_set():
            answers.append(await stream(client, body(number, 8)))

    async def update() -> None:
        await asyncio.to_thread(redeploy, faulty.config)
        deadline = time.monotonic() + 120.0
        while old & (await asyncio.to_thread(faulty.replicas)).keys():
            assert time.monotonic() < deadline, "the old replicas are still there"
            await asyncio.sleep(0.5)
        updated.set()

    async with clients(faulty) as client:
        try:
            async with asyncio.TaskGroup() as group:
                for number in range(4):
                    group.create_task(ask(client, number))
                group.create_task(update())
        finally:
            updated.set()
    assert len(answers) > 8
    assert [answer for answer in answers if not answer.whole] == []
    await healthy(faulty)
