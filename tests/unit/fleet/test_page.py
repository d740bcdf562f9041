"""The page in a real browser: what it shows in every state, and that nothing of the service runs in it.

Skipped where there is no Chromium. FLEET_PICTURES=FOLDER keeps pictures of every scene: light and dark, phone and desk.
"""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self, cast

import pytest
import uvicorn

from deployments.api.app import ServedModel, create_api
from deployments.fleet.page import load_page
from deployments.metrics.board import Observation
from deployments.settings import ApiSettings
from tests.chromium import Chromium, find_chromium
from tests.fakes.dispatcher import FakeDispatcher, Script
from tests.unit.fleet.scenes import HOSTILE, HOSTILE_TEXT, ONE, TWELVE, UNEQUAL, Rep, observation, plan_on
from tests.unit.placement.test_svg import contrast

CARDS = "document.querySelectorAll('.card:not(.absent)').length"


class FleetServer:
    """The app on a port of this machine, with models of which only `observe` is asked."""

    def __init__(
        self, scene: Mapping[str, Observation | None], settings: ApiSettings | None = None, **options: Any
    ) -> None:
        self._settings, self._options = settings or ApiSettings(), options
        self._app: Any = None
        self.show(scene)

    def show(self, scene: Mapping[str, Observation | None]) -> None:
        """Serve this from now on."""
        self.dispatchers = {name: FakeDispatcher(Script(), observation=seen) for name, seen in scene.items()}
        models = [
            ServedModel(name, (), cast(Any, None), dispatcher, model_context=256, created=1, wait_limit_s=60)
            for name, dispatcher in self.dispatchers.items()
        ]
        self._app = create_api(models, self._settings, **self._options)

    def __enter__(self) -> Self:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/fleet"
        self._server = uvicorn.Server(
            uvicorn.Config(self._answer, interface="asgi3", log_level="warning", lifespan="off")
        )
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]})
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        return self

    def stop(self) -> None:
        """No answer from now on."""
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()

    def __exit__(self, *_: object) -> None:
        self.stop()

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        await self._app(scope, receive, send)


def test_text_stands_out_in_light_and_in_dark() -> None:
    palettes = [
        dict(re.findall(r"--([a-z-]+): (#[0-9a-f]+)", block)) for block in load_page().html.split(":root {")[1:]
    ]
    assert len(palettes) == 2
    for palette in palettes:
        for ground in ("background", "surface"):
            for ink in ("text", "faint", "good", "note", "bad"):
                assert contrast(palette[ink], palette[ground]) >= 4.5, (ink, ground)
        for ink, ground in (("text", "note-fill"), ("text", "bad-fill"), ("surface", "focus")):
            assert contrast(palette[ink], palette[ground]) >= 4.5, (ink, ground)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    path = find_chromium()
    if path is None:
        pytest.skip("no Chromium here (Debian: apt-get install chromium-headless-shell)")
    with Chromium(path, tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture
def server() -> Iterator[FleetServer]:
    with FleetServer(ONE) as server:
        yield server


def opened(browser: Chromium, server: FleetServer, scene: Mapping[str, Observation | None], **options: Any) -> str:
    """The page once it shows `scene`, as its reader sees it."""
    server.show(scene)
    browser.open(server.url, **options)
    browser.wait("document.getElementById('models')?.getAttribute('aria-busy') === 'false'")
    return browser.text()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390], ids=["desk", "phone"])
def test_every_scene_fits_its_window(browser: Chromium, server: FleetServer, width: int, dark: bool) -> None:
    scenes = {"one": ONE, "unequal": UNEQUAL, "twelve": TWELVE, "hostile": HOSTILE}
    for name, scene in scenes.items():
        opened(browser, server, scene, width=width, dark=dark)
        (seen,) = scene.values()
        assert browser.value(CARDS) == len(seen.view.replicas)
        assert browser.value("document.documentElement.scrollWidth") == width
        red = browser.value("getComputedStyle(document.body).backgroundColor.match(/[0-9]+/)[0]")
        assert (int(red) < 128) == dark
        assert browser.complaints == []
        if folder := os.environ.get("FLEET_PICTURES"):
            browser.picture(Path(folder) / f"{name}-{width}-{'dark' if dark else 'light'}.png")


def test_figures_are_text_beside_the_colours(browser: Chromium, server: FleetServer) -> None:
    text = opened(browser, server, ONE)
    for words in ("11,040 tokens, 69 %", "in use 3,520", "granted, not used yet 1,440", "cached prefixes 2,080"):
        assert words in text
    assert "weights 5.00 GB · KV cache 14.1 GB (22 % in use) · reserve 2.13 GB" in text
    assert "measured 22.9 GB, +0.4 % against the plan" in text
    labels = browser.value("[...document.querySelectorAll('[role=img]')].map((bar) => bar.getAttribute('aria-label'))")
    assert labels[0].startswith("KV cache of 16,000 tokens: in use 3,520")
    assert labels[1].startswith("Plan of device 0, 24 GB card: weights 5.00 GB")
    browser.value("document.querySelector('details').open = true")
    assert "fragmentation\t300.0 MB\tof fragmentation" in browser.text()


def test_bars_are_to_scale(browser: Chromium, server: FleetServer) -> None:
    opened(browser, server, UNEQUAL)
    widths = browser.value(
        "[...document.querySelectorAll('.device .bar')].map((bar) => bar.getBoundingClientRect().width)"
    )
    assert [round(80 * width / widths[0]) for width in widths] == [80, 48, 24, 16]
    kv = browser.value(
        "[...document.querySelectorAll('.gauge > span')].map((part) => part.getBoundingClientRect().width)"
    )
    assert [round(1000 * width / sum(kv)) for width in kv] == [610, 140, 30, 220]


def test_it_updates_by_itself_and_keeps_what_is_open(browser: Chromium, server: FleetServer) -> None:
    opened(browser, server, {"m": observation(Rep("r", plan_on(24), held=100))})
    browser.value("document.querySelector('details').open = true; document.querySelector('.card').marked = true")
    server.dispatchers["m"].observation = observation(Rep("r", plan_on(24), held=800), Rep("s", plan_on(24)))
    browser.wait("document.body.innerText.includes('in use 12,800')")
    assert browser.value(CARDS) == 2
    assert browser.value("document.querySelector('.card').marked && document.querySelector('details').open")
    server.dispatchers["m"].observation = observation(Rep("s", plan_on(24)))
    browser.wait(f"{CARDS} === 1")
    assert browser.value("document.querySelector('.card').marked") is None


def test_every_state_says_its_name(browser: Chromium, server: FleetServer) -> None:
    replicas = (
        Rep("a", plan_on(24)),
        Rep("b", plan_on(24), draining=True),
        Rep("c", None, sellable=False, told=False, rate=None),
        Rep("d", plan_on(24), alive=False, silent_s=9.0),
    )
    text = opened(browser, server, {"m": observation(*replicas, expected=5, warming=True), "quiet": None})
    for words in (
        "Serving",
        "Draining",
        "Starting",
        "Lost, silent for 9 s",
        "3 of 5 replicas missing",
        "The ledger is new",
    ):
        assert words in text, words
    assert "It has not told its plan yet" in text
    assert "The ledger of this model has never answered." in text
    news = browser.value("document.getElementById('news').textContent")
    assert news.split(". ") == [
        "Replica b of m: Draining",
        "Replica c of m: Starting",
        "Replica d of m: Lost",
        "The ledger of quiet does not answer",
    ]


def test_last_values_stay_with_their_age_when_the_ledger_goes(browser: Chromium, server: FleetServer) -> None:
    opened(browser, server, ONE)
    server.dispatchers["llama-8b"].observation = None
    browser.wait("/does not answer. What follows is [1-9][0-9]* s old/.test(document.body.innerText)")
    assert "in use 3,520" in browser.text()
    server.dispatchers["llama-8b"].observation = ONE["llama-8b"]
    browser.wait("!document.body.innerText.includes('does not answer')")


def test_last_values_stay_with_their_age_when_the_service_goes(browser: Chromium, server: FleetServer) -> None:
    opened(browser, server, ONE)
    server.stop()
    browser.wait("/No news; values are [1-9][0-9]* s old/.test(document.body.innerText)")
    assert "in use 3,520" in browser.text()
    assert "The service does not answer. It is asked again each second." in browser.text()


def test_names_are_text_and_nothing_else(browser: Chromium, server: FleetServer) -> None:
    text = opened(browser, server, HOSTILE)
    for name in "mrp":
        assert f"{name} {HOSTILE_TEXT}" in text
    assert browser.value("document.querySelectorAll('img, main script').length") == 0
    assert browser.value("document.title") == "Headroom: fleet"
    assert browser.complaints == []


def test_the_policy_stops_a_script_that_would_get_in(browser: Chromium, server: FleetServer) -> None:
    opened(browser, server, ONE)
    browser.value("document.body.append(Object.assign(document.createElement('p'), {id: 'hole'}))")
    with pytest.raises(AssertionError, match="TrustedHTML"):
        browser.value("document.getElementById('hole').innerHTML = '<b>x</b>'")
    browser.value(
        "{const s = document.createElement('style'); s.textContent = 'body {display: none}'; document.head.append(s)}"
    )
    assert browser.value("getComputedStyle(document.body).display") == "block"
    assert any("Content Security Policy" in complaint for complaint in browser.complaints)


def test_where_a_key_is_needed_the_page_asks_for_it(browser: Chromium) -> None:
    def enter(key: str) -> None:
        browser.value(
            f"document.getElementById('key').value = '{key}'; document.querySelector('#key-form button').click()"
        )

    with FleetServer(ONE, ApiSettings(api_keys_env="KEYS"), environment={"KEYS": "sesame"}) as server:
        browser.open(server.url)
        browser.wait("document.body?.innerText.includes('This service asks for a key.')")
        enter("guess")
        browser.wait("document.body.innerText.includes('This key is not accepted.')")
        assert browser.value(CARDS) == 0
        enter("sesame")
        browser.wait(f"{CARDS} === 1")
        assert browser.value("document.getElementById('key-form').hidden")
