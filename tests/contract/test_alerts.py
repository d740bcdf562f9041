"""Alert rules and dashboard: only metrics that exist, a line in the runbook for each alert, and every alert fires
when it should and not before (Prometheus's own `promtool`, from Debian's package `prometheus`)."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.metrics.__main__ import table
from deployments.metrics.catalog import METRICS
from k8s.dashboard import dashboard

ROOT = Path(__file__).parents[2]
RULE = yaml.safe_load((ROOT / "k8s/base/prometheus-rule.yaml").read_text(encoding="utf-8"))
RULES: list[dict[str, Any]] = [rule for group in RULE["spec"]["groups"] for rule in group["rules"]]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
RECORDED = {rule["record"] for rule in RULES if "record" in rule}
SERIES = {m.name for m in METRICS if m.kind != "histogram"} | {
    f"{m.name}_{suffix}" for m in METRICS if m.kind == "histogram" for suffix in ("bucket", "sum", "count")
}
MODEL = '{model="m"}'
REPLICA = '{model="m", pool="p", replica="r"}'
STAGE = '{model="m", pool="p", replica="r", stage="0"}'

promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="needs promtool: apt-get install prometheus (Debian)"
)

# Alert -> (series that make it fire, when it fires, series that don't). One value a minute.
CASES: dict[str, tuple[dict[str, str], str, dict[str, str]]] = {
    "HeadroomLow": (
        {
            f"headroom_headroom_tokens{REPLICA}": "150x30",
            f"headroom_kv_blocks{REPLICA}": "100x30",
            f"headroom_kv_block_tokens{REPLICA}": "16x30",
        },
        "11m",
        {
            f"headroom_headroom_tokens{REPLICA}": "160x30",
            f"headroom_kv_blocks{REPLICA}": "100x30",
            f"headroom_kv_block_tokens{REPLICA}": "16x30",
        },
    ),
    "HeadroomQueueGrowing": (
        {f"headroom_queue_requests{MODEL}": "1+2x30"},
        "12m",
        {f"headroom_queue_requests{MODEL}": "50x30"},
    ),
    "HeadroomRefusing": (
        {'headroom_refusals_total{model="m", reason="queue_full"}': "0+6x30"},
        "8m",
        {'headroom_refusals_total{model="m", reason="too_long"}': "0+6x30"},
    ),
    "HeadroomPreemptions": (
        {f"headroom_preemptions_total{REPLICA}": "0+2x30"},
        "20m",
        {f"headroom_preemptions_total{REPLICA}": "0+1x30"},
    ),
    "HeadroomPlanError": (
        {
            f"headroom_gpu_memory_predicted_bytes{STAGE}": "1000x30",
            f"headroom_gpu_memory_measured_bytes{STAGE}": "1031x30",
        },
        "6m",
        {
            f"headroom_gpu_memory_predicted_bytes{STAGE}": "1000x30",
            f"headroom_gpu_memory_measured_bytes{STAGE}": "1029x30",
        },
    ),
    "HeadroomReplicaUnhealthy": (
        {f"headroom_replicas_ready{MODEL}": "1x30", f"headroom_replicas_expected{MODEL}": "2x30"},
        "11m",
        {f"headroom_replicas_ready{MODEL}": "2x30", f"headroom_replicas_expected{MODEL}": "2x30"},
    ),
    "HeadroomLedgerDown": ({f"headroom_ledger_up{MODEL}": "0x30"}, "2m", {f"headroom_ledger_up{MODEL}": "1x30"}),
    "HeadroomDown": ({f"headroom_kv_blocks{REPLICA}": "1x30"}, "6m", {f"headroom_ledger_up{MODEL}": "1x30"}),
}


def unknown_metrics(expr: str) -> set[str]:
    """Names in a query that no metric has."""
    return set(re.findall(r"\bheadroom[a-z_:]+", expr)) - SERIES - RECORDED


def firing(tmp_path: Path, alert: str, series: dict[str, str], at: str, *, expected: bool) -> str:
    """What promtool has against `alert` firing (or not) at `at`; empty when nothing."""
    rules = tmp_path / "rules.yaml"
    rules.write_text(yaml.safe_dump(RULE["spec"]), encoding="utf-8")
    test = {
        "rule_files": [str(rules)],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": name, "values": values} for name, values in series.items()],
                "promql_expr_test": [
                    {
                        "expr": f'count(ALERTS{{alertname="{alert}", alertstate="firing"}})',
                        "eval_time": at,
                        "exp_samples": [{"labels": "{}", "value": 1}] if expected else [],
                    }
                ],
            }
        ],
    }
    path = tmp_path / "test.yaml"
    path.write_text(yaml.safe_dump(test), encoding="utf-8")
    done = subprocess.run(["promtool", "test", "rules", str(path)], capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def test_every_metric_is_in_the_docs() -> None:
    page = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    assert table() in page, "renew the table of docs/metrics.md: python -m deployments.metrics"


def test_names_follow_prometheus() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert metric.name.startswith("headroom_")
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert metric.kind != "histogram" or metric.name.endswith("_seconds")
        assert metric.meaning.endswith(".")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.get("alert") or rule["record"])
def test_rules_name_metrics_that_exist(rule: dict[str, Any]) -> None:
    assert unknown_metrics(rule["expr"]) == set()


def test_a_metric_that_does_not_exist_is_found() -> None:
    assert unknown_metrics("rate(headroom_preemption_total[5m])") == {"headroom_preemption_total"}
    assert unknown_metrics("headroom_step_seconds") == {"headroom_step_seconds"}, (
        "a histogram has no series of its name"
    )


@pytest.mark.parametrize("alert", ALERTS)
def test_every_alert_has_a_line_in_the_runbook(alert: str) -> None:
    page, _, anchor = ALERTS[alert]["annotations"]["runbook_url"].partition("#")
    assert anchor == alert.lower()
    assert f"\n### {alert}\n" in (ROOT / page).read_text(encoding="utf-8")


def test_the_dashboard_is_what_its_program_prints() -> None:
    written = json.loads((ROOT / "k8s/base/dashboard.json").read_text(encoding="utf-8"))
    assert written == dashboard(), "renew it: python -m k8s.dashboard > k8s/base/dashboard.json"


def test_dashboard_panels_are_whole_and_do_not_overlap() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    covered: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        columns = range(place["x"], place["x"] + place["w"])
        cells = {(x, y) for x in columns for y in range(place["y"], place["y"] + place["h"])}
        assert not cells & covered
        assert all(0 <= x < 24 for x, _ in cells)
        covered |= cells
        for target in panel.get("targets", ()):
            assert unknown_metrics(target["expr"]) == set()
    rows = [panel["title"] for panel in panels if panel["type"] == "row"]
    assert rows == ["Headroom", "Latency", "Throughput", "Queue and refusals", "Memory plan", "Engine"]


@promtool
def test_promtool_accepts_the_rules_and_refuses_a_broken_one(tmp_path: Path) -> None:
    def check(spec: dict[str, Any]) -> int:
        path = tmp_path / "rules.yaml"
        path.write_text(yaml.safe_dump(spec), encoding="utf-8")
        return subprocess.run(["promtool", "check", "rules", str(path)], capture_output=True, check=False).returncode

    assert check(RULE["spec"]) == 0
    broken = json.loads(json.dumps(RULE["spec"]).replace("sum by (model) (", "sum by (model) ((", 1))
    assert check(broken) != 0


def test_every_alert_has_a_case() -> None:
    assert CASES.keys() == ALERTS.keys()


@promtool
@pytest.mark.parametrize("alert", CASES)
def test_an_alert_fires_when_it_should_and_not_before(alert: str, tmp_path: Path) -> None:
    fires, at, quiet = CASES[alert]
    assert firing(tmp_path, alert, fires, at, expected=True) == ""
    assert firing(tmp_path, alert, fires, "0m", expected=False) == ""
    assert firing(tmp_path, alert, quiet, "30m", expected=False) == ""
    assert "FAILED" in firing(tmp_path, alert, quiet, "30m", expected=True), "promtool would say anything"
