"""A real Prometheus (Debian's package) reads a real service under load: every metric, rule and dashboard query.

8 seconds of load by default, and 3 without: long enough for Prometheus to drop what the page no longer has (it does at
its next look), and to see that idle processes still tell of themselves. That the page forgets what a
process said only 30 s after its last word, and an idle one's never, is tested with a clock of its own
(tests/unit/metrics/test_page.py). `HEADROOM_LOAD_S=180 HEADROOM_IDLE_S=60` wait for it here.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from deployments.metrics.catalog import METRICS, Metric
from k8s.dashboard import dashboard
from tests.integration.conftest import MODEL, Service, free_port, start_service
from tests.waiting import wait_for

LOAD_S = float(os.environ.get("HEADROOM_LOAD_S", "8"))
IDLE_S = float(os.environ.get("HEADROOM_IDLE_S", "3"))
CLIENTS = 12
RULES = Path(__file__).parents[2] / "k8s/base/prometheus-rule.yaml"
GPU_ONLY = {metric.name for metric in METRICS if metric.name.startswith("headroom_gpu_")}

pytestmark = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="needs Prometheus: apt-get install prometheus (Debian)"
)


@dataclass(frozen=True)
class Prometheus:
    """A running Prometheus."""

    url: str

    def ask(self, path: str, **parameters: Any) -> Any:
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=30).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def now(self, expr: str) -> list[float]:
        """The values of a query's series."""
        return [float(series["value"][1]) for series in self.ask("query", query=expr)["result"]]

    def total(self, expr: str) -> float:
        return sum(self.now(expr))

    def over(self, expr: str, began: float, ended: float) -> list[float]:
        """All values of a query between two instants, over all series."""
        data = self.ask("query_range", query=expr, start=began, end=ended, step=1)
        return [float(value) for series in data["result"] for _, value in series["values"]]


@contextmanager
def prometheus(folder: Path, target: str) -> Iterator[Prometheus]:
    rules = folder / "rules.yaml"
    rules.write_text(yaml.safe_dump(yaml.safe_load(RULES.read_text(encoding="utf-8"))["spec"]), encoding="utf-8")
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(rules)],
        "scrape_configs": [{"job_name": "headroom", "static_configs": [{"targets": [target]}]}],
    }
    path = folder / "prometheus.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    address = f"127.0.0.1:{free_port()}"
    command = ["prometheus", f"--config.file={path}", f"--storage.tsdb.path={folder / 'data'}"]
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen([*command, f"--web.listen-address={address}"], stdout=log, stderr=log)
        try:
            wait_for(lambda: _ready(address), 60)
            yield Prometheus(f"http://{address}")
        finally:
            process.terminate()
            process.wait(30)


def _ready(address: str) -> bool:
    try:
        return httpx.get(f"http://{address}/-/ready").status_code == 200
    except httpx.TransportError:
        return False


@dataclass(frozen=True)
class Sent:
    """What one client sent and got."""

    answered: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0


def client(url: str, number: int, until: float) -> Sent:
    """Asks for one completion after the other."""
    sent = Sent()
    with httpx.Client(base_url=url, timeout=600) as http:
        while time.monotonic() < until:
            words = " ".join(["count"] * (8 + 16 * (number % 3)))
            body = {"model": MODEL, "prompt": words, "max_tokens": 8 + 8 * number, "ignore_eos": True}
            usage = http.post("/v1/completions", json=body).raise_for_status().json()["usage"]
            sent = Sent(
                sent.answered + 1,
                sent.prompt_tokens + usage["prompt_tokens"],
                sent.output_tokens + usage["completion_tokens"],
            )
    return sent


@dataclass(frozen=True)
class Run:
    """A service that was loaded, and then left alone; Prometheus watched it."""

    prometheus: Prometheus
    page: str
    sent: Sent
    began: float
    ended: float
    """Unix seconds of the load."""
    told: tuple[int, int]
    """How often the ingress had told how it stands when the service became idle, and when it had been idle."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, demo_folder: Path) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("metrics")
    # Room for some 450 tokens of KV cache in each replica, so that requests wait for blocks.
    pool = {
        "replicas": 2,
        "device": "cpu",
        "dtype": "float32",
        "max_memory": {0: "220MB"},
        "max_context": 256,
        "max_sequences": 8,
    }
    model = {"name": MODEL, "wait_limit_s": 600, "pools": [pool]}  # on a slow machine they wait for minutes
    with (
        start_service(folder, demo_folder, model, {}) as service,
        prometheus(folder, service.url.removeprefix("http://")) as watching,
    ):
        began = time.time()
        sent = load(service)
        ended = time.time()
        wait_for(service.idle, 60)
        told = service.told()
        time.sleep(IDLE_S)
        told_later = service.told()
        page = httpx.get(f"{service.url}/metrics").text
        yield Run(watching, page, sent, began, ended, (told, told_later))


def load(service: Service) -> Sent:
    until = time.monotonic() + LOAD_S
    too_long = {"model": MODEL, "prompt": "x", "max_tokens": 100_000}
    assert httpx.post(f"{service.url}/v1/completions", json=too_long).status_code == 400
    with ThreadPoolExecutor(CLIENTS) as pool:
        parts = list(pool.map(lambda number: client(service.url, number, until), range(CLIENTS)))
    return Sent(
        sum(part.answered for part in parts),
        sum(part.prompt_tokens for part in parts),
        sum(part.output_tokens for part in parts),
    )


def series_of(metric: Metric) -> str:
    return f"{metric.name}_count" if metric.kind == "histogram" else metric.name


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_every_metric_is_still_there_after_idling(run: Run, metric: Metric) -> None:
    values = run.prometheus.now(series_of(metric))
    assert bool(values) == (metric.name not in GPU_ONLY)
    assert all(math.isfinite(value) for value in values)
    assert metric.kind == "gauge" or all(value >= 0 for value in values)


def test_an_idle_service_goes_on_telling(run: Run) -> None:
    before, after = run.told
    assert before < after, "the page would be empty 30 s later"


def test_counters_say_what_the_clients_counted(run: Run) -> None:
    sent = run.sent
    assert sent.answered >= CLIENTS
    said = {
        'headroom_requests_total{model="smol", outcome="ok"}': sent.answered,
        'headroom_requests_total{model="smol", outcome="context_length_exceeded"}': 1,
        "headroom_prompt_tokens_total": sent.prompt_tokens,
        "headroom_output_tokens_total": sent.output_tokens,
        "headroom_time_to_first_token_seconds_count": sent.answered,
        "headroom_queue_seconds_count": sent.answered,
        "headroom_inter_token_seconds_count": sent.output_tokens - sent.answered,
        "headroom_ledger_up": 1,
        "headroom_replicas_ready": 2,
        "headroom_replicas_expected": 2,
        'headroom_requests_total{model=""}': 0,
    }
    everything = run.prometheus.ask("query", query="headroom_requests_total")["result"]
    assert {expr: run.prometheus.total(expr) for expr in said} == said, everything


def test_an_idle_service_holds_nothing(run: Run) -> None:
    total = run.prometheus.total
    for name in ("kv_blocks_held", "kv_blocks_granted", "requests_running", "requests_waiting", "queue_requests"):
        assert total(f"headroom_{name}") == 0
    assert total("headroom_headroom_tokens") == total("headroom_kv_blocks * headroom_kv_block_tokens") > 0


def test_values_under_load_are_sane(run: Run) -> None:
    def most(expr: str) -> float:
        return max(run.prometheus.over(expr, run.began, run.ended))

    assert 0 < most("headroom_kv_blocks_held") <= most("headroom_kv_blocks")
    assert 0 < most("sum(headroom_requests_running)") <= CLIENTS
    assert most("headroom_queue_requests") > 0
    assert most("headroom:free_kv:share") <= 1
    busy, steps = run.prometheus.total("headroom_stage_busy_seconds_total"), "headroom_step_seconds_sum"
    assert 0 < busy <= run.prometheus.total(steps) <= 2 * (LOAD_S + 120)
    assert run.prometheus.total("headroom_queue_waits_total") > 0


def test_every_dashboard_query_returns_data(run: Run) -> None:
    queries = [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", ())]
    assert queries
    for query in queries:
        expr = query.replace("$__rate_interval", "10s").replace("$model", ".*")
        values = run.prometheus.over(expr, run.began, run.ended + 5)
        if any(name in query for name in GPU_ONLY):
            assert not values, f"{query} has data without a GPU"
        else:
            assert any(math.isfinite(value) for value in values), f"{query} has no data"


def test_prometheus_evaluates_the_rules_and_nothing_alarms(run: Run) -> None:
    rules = [rule for group in run.prometheus.ask("rules")["groups"] for rule in group["rules"]]
    assert {rule["health"] for rule in rules} == {"ok"}
    assert [rule["name"] for rule in rules if rule.get("state") == "firing"] == []


def test_promtool_has_nothing_against_the_page(run: Run) -> None:
    done = subprocess.run(["promtool", "check", "metrics"], input=run.page, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
