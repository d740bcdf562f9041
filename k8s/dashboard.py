"""The Grafana dashboard: `python -m k8s.dashboard > k8s/base/dashboard.json`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

SOURCE = {"type": "prometheus", "uid": "${source}"}
MODEL = 'model=~"$model"'
WIDTH, HEIGHT = 24, 8


@dataclass(frozen=True)
class Query:
    """One line, or one family of lines, of a panel."""

    expr: str
    legend: str


@dataclass(frozen=True)
class Panel:
    """One picture."""

    title: str
    unit: str
    queries: tuple[Query, ...]
    about: str = ""


def quantiles(metric: str) -> tuple[Query, ...]:
    """Median, p95 and p99 of a histogram over all replicas or ingresses."""
    rate = f"sum by (le) (rate({metric}_bucket{{{MODEL}}}[$__rate_interval]))"
    return tuple(
        Query(f"histogram_quantile({share}, {rate})", name)
        for share, name in ((0.5, "median"), (0.95, "p95"), (0.99, "p99"))
    )


def rate(metric: str, by: str) -> str:
    """Per second, summed."""
    return f"sum by ({by}) (rate({metric}{{{MODEL}}}[$__rate_interval]))"


def share(part: str, whole: str) -> str:
    """Of two counters' growth; nothing where the whole did not grow."""
    return f"{rate(part, 'model')} / ({rate(whole, 'model')} > 0)"


REPLICA, STAGE = "{{pool}} {{replica}}", "{{pool}} {{replica}} stage {{stage}}"
BLOCKS = ("kv_blocks", "kv_blocks_granted", "kv_blocks_held", "kv_blocks_cached")

ROWS: dict[str, tuple[Panel, ...]] = {
    "Headroom": (
        Panel(
            "Headroom by replica",
            "none",
            (Query(f"headroom_headroom_tokens{{{MODEL}}}", REPLICA),),
            "Tokens of KV cache neither held nor granted.",
        ),
        Panel(
            "KV blocks",
            "none",
            tuple(Query(f"sum(headroom_{name}{{{MODEL}}})", name.replace("_", " ")) for name in BLOCKS),
            "Granted is what routing counts on; held is in use; cached can be evicted.",
        ),
        Panel(
            "Replicas and ledgers",
            "none",
            (
                Query(f"sum by (model) (headroom_replicas_ready{{{MODEL}}})", "{{model}} ready"),
                Query(f"sum by (model) (headroom_replicas_expected{{{MODEL}}})", "{{model}} expected"),
                Query(f"min by (model) (headroom_ledger_up{{{MODEL}}})", "{{model}} ledger"),
            ),
        ),
    ),
    "Latency": (
        Panel("Time to first token", "s", quantiles("headroom_time_to_first_token_seconds")),
        Panel("From token to token", "s", quantiles("headroom_inter_token_seconds")),
    ),
    "Throughput": (
        Panel(
            "Output tokens per second",
            "none",
            (Query(rate("headroom_output_tokens_total", "pool, replica"), REPLICA),),
        ),
        Panel(
            "Prompt tokens per second",
            "none",
            (
                Query(rate("headroom_prompt_tokens_total", "model"), "{{model}}"),
                Query(rate("headroom_cached_prompt_tokens_total", "model"), "{{model}} from the prefix cache"),
            ),
        ),
        Panel("Requests per second", "reqps", (Query(rate("headroom_requests_total", "outcome"), "{{outcome}}"),)),
    ),
    "Queue and refusals": (
        Panel("Requests that wait for blocks", "none", (Query(f"headroom_queue_requests{{{MODEL}}}", "{{model}}"),)),
        Panel("Time in the queue", "s", quantiles("headroom_queue_seconds")),
        Panel(
            "Refusals per second",
            "reqps",
            (Query(rate("headroom_refusals_total", "reason"), "{{reason}}"),),
        ),
        Panel(
            "Error of the forecast wait",
            "percentunit",
            (
                Query(
                    share("headroom_queue_forecast_error_seconds_total", "headroom_queue_waited_seconds_total"),
                    "{{model}}",
                ),
            ),
            "How wrong the waits were that Retry-After is taken from, as a share of the waits.",
        ),
    ),
    "Memory plan": (
        Panel(
            "GPU memory, predicted and measured",
            "bytes",
            (
                Query(f"headroom_gpu_memory_predicted_bytes{{{MODEL}}}", f"{STAGE} predicted"),
                Query(f"headroom_gpu_memory_measured_bytes{{{MODEL}}}", f"{STAGE} measured"),
            ),
            "Empty on the CPU.",
        ),
        Panel(
            "Error of the plan",
            "percentunit",
            (
                Query(
                    f"headroom_gpu_memory_measured_bytes{{{MODEL}}} "
                    f"/ headroom_gpu_memory_predicted_bytes{{{MODEL}}} - 1",
                    STAGE,
                ),
            ),
            "Measured over predicted, less 1: above 0 the GPU holds more than planned. Empty on the CPU.",
        ),
        Panel(
            "Error of the grants",
            "percentunit",
            (
                Query(share("headroom_grant_blocks_unused_total", "headroom_grant_blocks_total"), "{{model}} unused"),
                Query(share("headroom_grant_blocks_beyond_total", "headroom_grant_blocks_total"), "{{model}} beyond"),
            ),
            "Blocks granted and not needed, and needed beyond the grant, as shares of those granted.",
        ),
    ),
    "Engine": (
        Panel(
            "Requests in the engines",
            "none",
            (
                Query(f"headroom_requests_running{{{MODEL}}}", f"{REPLICA} running"),
                Query(f"headroom_requests_waiting{{{MODEL}}}", f"{REPLICA} waiting"),
            ),
        ),
        Panel("Step time", "s", quantiles("headroom_step_seconds")),
        Panel(
            "Idle share of the stages",
            "percentunit",
            (
                Query(
                    f"1 - rate(headroom_stage_busy_seconds_total{{{MODEL}}}[$__rate_interval]) "
                    "/ on (model, pool, replica) group_left () "
                    f"(rate(headroom_step_seconds_sum{{{MODEL}}}[$__rate_interval]) > 0)",
                    STAGE,
                ),
            ),
            "Of the time in which there was work. Not measured on GPUs.",
        ),
        Panel(
            "Preemptions per second",
            "none",
            (Query(rate("headroom_preemptions_total", "pool, replica"), REPLICA),),
        ),
    ),
}


def dashboard() -> dict[str, Any]:
    """Grafana's model of the dashboard (schema version 39: Grafana 11 and later read it)."""
    return {
        "uid": "headroom",
        "title": "Headroom",
        "tags": ["headroom"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": [_source_choice(), _model_choice()]},
        "annotations": {"list": []},
        "links": [],
        "panels": list(_panels()),
    }


def _panels() -> Iterator[dict[str, Any]]:
    number, y = 0, 0
    for title, panels in ROWS.items():
        number += 1
        place = {"h": 1, "w": WIDTH, "x": 0, "y": y}
        yield {"id": number, "type": "row", "title": title, "collapsed": False, "gridPos": place, "panels": []}
        width = WIDTH // len(panels)
        for i, panel in enumerate(panels):
            number += 1
            yield _panel(panel, number, {"h": HEIGHT, "w": width, "x": i * width, "y": y + 1})
        y += 1 + HEIGHT


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    targets = [
        {"refId": chr(ord("A") + i), "datasource": SOURCE, "expr": query.expr, "legendFormat": query.legend}
        for i, query in enumerate(panel.queries)
    ]
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.about,
        "datasource": SOURCE,
        "gridPos": place,
        "targets": targets,
        "fieldConfig": {"defaults": {"unit": panel.unit, "custom": {"fillOpacity": 10}}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
    }


def _source_choice() -> dict[str, Any]:
    return {"name": "source", "label": "Source", "type": "datasource", "query": "prometheus", "hide": 0}


def _model_choice() -> dict[str, Any]:
    query = "label_values(headroom_ledger_up, model)"
    return {
        "name": "model",
        "label": "Model",
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": query, "refId": "model"},
        "definition": query,
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
        "hide": 0,
    }


if __name__ == "__main__":
    print(json.dumps(dashboard(), indent=2))
