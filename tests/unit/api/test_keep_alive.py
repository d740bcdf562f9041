"""Silence in a stream, as in a long prefill: comments keep it open, behind a real nginx too.

3 s of silence behind a nginx that allows 1 s; `HEADROOM_SILENCE_S=120` instead tries the defaults of both: a comment
every 15 s, and nginx's 60 s.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from deployments.settings import ApiSettings
from tests.fakes.dispatcher import Script
from tests.unit.api.conftest import Api
from tests.unit.api.test_chat import CHAT, asking

SILENCE_S = float(os.environ.get("HEADROOM_SILENCE_S", "3"))
DEFAULTS = SILENCE_S > 60
COMMENT = ": keep-alive"
NGINX = """
daemon off;
pid {folder}/pid;
error_log {folder}/error.log;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    {read_timeout}
    server {{
        listen 127.0.0.1:{port};
        location / {{ proxy_pass http://127.0.0.1:{back}; }}
    }}
}}
"""


def events_of(lines: list[str]) -> list[str]:
    return [line for line in lines if line and not line.startswith(":")]


def contents_of(lines: list[str]) -> str:
    chunks = [json.loads(line.removeprefix("data: ")) for line in events_of(lines) if line != "data: [DONE]"]
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)


async def test_a_silent_stream_gets_comments_between_events(
    make_api: Callable[..., Api], speak: Callable[..., Script]
) -> None:
    api = make_api(speak("ab", step_s=0.3), ApiSettings(keep_alive_s=0.02))
    lines = (await api.post(CHAT, json=asking(stream=True))).text.splitlines()
    assert lines.count(COMMENT) >= 3
    assert all(lines[i + 1] == "" for i, line in enumerate(lines) if line == COMMENT)
    first_content = next(i for i, line in enumerate(lines) if '"content":"a"' in line)
    assert '"role":"assistant"' in lines[0]
    assert COMMENT in lines[:first_content]
    assert (contents_of(lines), events_of(lines)[-1]) == ("ab", "data: [DONE]")


async def test_no_comment_where_there_is_no_silence_or_none_is_wished(
    make_api: Callable[..., Api], speak: Callable[..., Script]
) -> None:
    for settings, step_s in ((ApiSettings(), 0.0), (ApiSettings(keep_alive_s=None), 0.05)):
        text = (await make_api(speak("ab", step_s=step_s), settings).post(CHAT, json=asking(stream=True))).text
        assert ":" not in [line[:1] for line in text.splitlines()]
        assert contents_of(text.splitlines()) == "ab"


async def test_a_whole_answer_waits_in_silence(make_api: Callable[..., Api], speak: Callable[..., Script]) -> None:
    api = make_api(speak("ab", step_s=0.05), ApiSettings(keep_alive_s=0.01))
    assert (await api.post(CHAT, json=asking())).json()["choices"][0]["message"]["content"] == "ab"


async def test_comments_are_no_first_token_and_the_deadline_stays(
    make_api: Callable[..., Api], speak: Callable[..., Script], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    api = make_api(speak("ab", step_s=60), ApiSettings(keep_alive_s=0.02, request_timeout_s=0.5))
    lines = (await api.post(CHAT, json=asking(stream=True))).text.splitlines()
    assert lines.count(COMMENT) >= 2
    assert json.loads(events_of(lines)[-1].removeprefix("data: "))["error"]["code"] == "request_timeout"
    [line] = [json.loads(record.message) for record in caplog.records if record.name == "headroom.access"]
    assert (line["error"], line["first_token_s"]) == ("request_timeout", None)


@asynccontextmanager
async def served(app: Any) -> AsyncIterator[int]:
    """The app on a real server; gives its port."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="warning"))
        serving = asyncio.create_task(server.serve([listening]))
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            await serving


@asynccontextmanager
async def nginx(folder: Path, back: int) -> AsyncIterator[str]:
    """A nginx before that port; gives its address."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    config = folder / "nginx.conf"
    read_timeout = "" if DEFAULTS else "proxy_read_timeout 1s;"
    config.write_text(NGINX.format(folder=folder, port=port, back=back, read_timeout=read_timeout), encoding="utf-8")
    process = subprocess.Popen(["nginx", "-c", str(config), "-p", str(folder), "-e", str(folder / "error.log")])
    url = f"http://127.0.0.1:{port}"
    try:
        async with asyncio.timeout(30), httpx.AsyncClient(base_url=url) as client:
            while not await _answers(client):
                assert process.poll() is None, (folder / "error.log").read_text()
                await asyncio.sleep(0.05)
        yield url
    finally:
        process.terminate()
        process.wait(30)


async def _answers(client: httpx.AsyncClient) -> bool:
    try:
        return (await client.get("/health")).status_code == 200
    except httpx.TransportError:
        return False


async def lines_through_nginx(api: Api, folder: Path) -> list[str]:
    """What a client of the stream reads until it ends or is cut."""
    folder.mkdir()
    lines = []
    async with (
        served(api.app) as back,
        nginx(folder, back) as url,
        httpx.AsyncClient(base_url=url, timeout=SILENCE_S + 30) as client,
        client.stream("POST", CHAT, json=asking(stream=True)) as answer,
    ):
        assert (answer.status_code, answer.headers["server"].split("/")[0]) == (200, "nginx")
        with contextlib.suppress(httpx.RemoteProtocolError):  # What a cut is to a client, where it sees one.
            async for line in answer.aiter_lines():
                lines.append(line)
    return lines


@pytest.mark.skipif(shutil.which("nginx") is None, reason="needs nginx: apt-get install nginx-light (Debian)")
async def test_nginx_keeps_a_silent_stream_that_has_comments_and_cuts_one_that_has_none(
    make_api: Callable[..., Api], speak: Callable[..., Script], tmp_path: Path
) -> None:
    limit = {"request_timeout_s": 10 * SILENCE_S}
    with_comments = ApiSettings(**limit, **({} if DEFAULTS else {"keep_alive_s": 0.1}))  # type: ignore[arg-type]  # pydantic checks them
    without = ApiSettings(**limit, keep_alive_s=None)
    kept, cut = await asyncio.gather(
        lines_through_nginx(make_api(speak("a", step_s=SILENCE_S), with_comments), tmp_path / "kept"),
        lines_through_nginx(make_api(speak("a", step_s=SILENCE_S), without), tmp_path / "cut"),
    )
    assert (contents_of(kept), events_of(kept)[-1]) == ("a", "data: [DONE]")
    assert kept.count(COMMENT) >= (7 if DEFAULTS else 4)
    assert "upstream timed out" in (tmp_path / "cut/error.log").read_text()
    assert (contents_of(cut), len(events_of(cut))) == ("", 1)
