"""The metrics page: every metric of the catalogue, from what ledgers, replicas and ingresses said."""

from __future__ import annotations

from dataclasses import replace

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from deployments.metrics.board import FORGET_S, Board, Observation
from deployments.metrics.catalog import METRICS
from deployments.metrics.meter import IngressMeter
from deployments.metrics.overview import Overview
from deployments.metrics.page import render
from deployments.metrics.vitals import IngressVitals
from deployments.protocol import IngressNotice, Refusal, ReplicaState
from tests.unit.metrics.samples import VIEW, ingress_vitals, replica_vitals

OK = ("headroom_requests_total", (("ingress", "i1"), ("model", "m"), ("outcome", "ok")))
R1 = (("model", "m"), ("pool", "default"), ("replica", "r1"))
OPENMETRICS = "application/openmetrics-text; version=1.0.0"


def report(**changes: object) -> ReplicaState:
    state = ReplicaState("r1", "default", 1, 1, 16, 100, 1600, vitals=replica_vitals())
    return replace(state, **changes)  # type: ignore[arg-type]  # by name


def observe(board: Board, now: float = 0.0) -> Observation:
    return board.observe(VIEW, 2, now)


def full_board() -> Board:
    board = Board()
    board.hear_replica(report(), 0.0)
    board.hear_ingress(IngressNotice("i1", vitals=ingress_vitals("i1")), 0.0)
    board.count(Refusal("q", "queue_full", "full"))
    return board


def samples(overview: Overview) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    page, _ = render(overview, OPENMETRICS)
    families = text_string_to_metric_families(page.decode())
    found: list[Sample] = [sample for family in families for sample in family.samples]
    return {(sample.name, tuple(sorted(sample.labels.items()))): sample.value for sample in found}


@pytest.fixture
def full() -> Overview:
    return Overview((("m", observe(full_board())), ("lost", None)))


def test_every_metric_of_the_catalogue_is_there(full: Overview) -> None:
    shown = {name for name, _ in samples(full)}
    for metric in METRICS:
        assert (f"{metric.name}_bucket" if metric.kind == "histogram" else metric.name) in shown
        assert all(len(labels) == len(metric.labels) for labels, _ in metric.rows(full))


def test_values_are_what_was_said(full: Overview) -> None:
    shown = samples(full)
    replica = (("model", "m"), ("pool", "default"), ("replica", "r1"))
    stage_1 = (*replica, ("stage", "1"))
    assert shown["headroom_ledger_up", (("model", "m"),)] == 1
    assert shown["headroom_ledger_up", (("model", "lost"),)] == 0
    assert shown["headroom_replicas_expected", (("model", "m"),)] == 2
    assert shown["headroom_replicas_ready", (("model", "m"),)] == 1
    assert shown["headroom_kv_blocks_granted", replica] == 40
    assert shown["headroom_headroom_tokens", replica] == (100 - 40) * 16
    assert shown["headroom_queue_forecast_error_seconds_total", (("model", "m"),)] == 0.7
    assert shown["headroom_kv_blocks_held", replica] == 30
    assert shown["headroom_stage_busy_seconds_total", stage_1] == 4.0
    assert shown["headroom_gpu_memory_measured_bytes", stage_1] == 960
    assert shown["headroom_grant_blocks_beyond_total", replica] == 2
    assert shown["headroom_refusals_total", (("model", "m"), ("reason", "queue_full"))] == 1
    assert shown["headroom_refusals_total", (("model", "m"), ("reason", "deadline"))] == 0
    ok = (("ingress", "i1"), ("model", "m"), ("outcome", "ok"))
    assert shown["headroom_requests_total", ok] == 3
    assert shown["headroom_requests_total", (("ingress", "i1"), ("model", ""), ("outcome", "invalid_api_key"))] == 1


def test_buckets_are_cumulative(full: Overview) -> None:
    shown = samples(full)
    name, labels = "headroom_time_to_first_token_seconds", (("ingress", "i1"), ("model", "m"))
    assert shown[f"{name}_bucket", tuple(sorted((*labels, ("le", "0.25"))))] == 2
    assert shown[f"{name}_bucket", tuple(sorted((*labels, ("le", "+Inf"))))] == shown[f"{name}_count", labels] == 3
    assert shown[f"{name}_sum", labels] == pytest.approx(500.3)


def test_what_the_cpu_does_not_have_is_absent_and_not_zero() -> None:
    board = Board()
    cpu = replica_vitals(predicted_bytes=(), measured_bytes=())
    board.hear_replica(report(vitals=cpu), 0.0)
    names = {name for name, _ in samples(Overview((("m", observe(board)),)))}
    assert "headroom_kv_blocks_held" in names
    assert not {name for name in names if name.startswith("headroom_gpu_memory")}


def test_text_is_prometheus_for_a_browser_and_openmetrics_for_who_asks(full: Overview) -> None:
    page, content_type = render(full, "text/html")
    assert content_type.startswith("text/plain")
    assert b"# EOF" not in page
    page, content_type = render(full, OPENMETRICS)
    assert content_type.startswith("application/openmetrics-text")
    assert page.endswith(b"# EOF\n")


def test_a_silent_process_is_forgotten_and_a_replica_that_the_ledger_forgot_is_not_shown() -> None:
    board = full_board()
    assert set(observe(board, FORGET_S).replicas) == {"r1"}
    gone = replace(VIEW, replicas=())
    assert board.observe(gone, 2, 1.0).replicas == {}
    late = observe(board, FORGET_S + 0.1)
    assert late.replicas == {}
    assert late.ingresses == ()
    assert late.refusals == (("queue_full", 1),)


def test_an_idle_process_outlives_the_forgetting_for_as_long_as_it_tells() -> None:
    board = full_board()
    for second in range(1, int(4 * FORGET_S)):
        board.hear_replica(report(), float(second))
        board.hear_ingress(IngressNotice("i1", vitals=ingress_vitals("i1")), float(second))
    late = observe(board, 4 * FORGET_S)
    assert (set(late.replicas), [seen.ingress_id for seen in late.ingresses]) == ({"r1"}, ["i1"])


def test_reports_without_vitals_keep_the_last_ones() -> None:
    board = full_board()
    board.hear_replica(report(vitals=None), 1.0)
    board.hear_ingress(IngressNotice("i1"), 1.0)
    assert observe(board, 1.0).replicas["r1"] == replica_vitals()
    assert observe(board, 1.0).ingresses == (ingress_vitals("i1"),)


def test_an_ingress_of_two_models_is_shown_once_and_by_its_newest_counts() -> None:
    meter = IngressMeter("i1")
    old, new = Board(), Board()
    meter.of("m").outcomes["ok"] += 1
    old.hear_ingress(IngressNotice("i1", vitals=meter.vitals()), 0.0)
    meter.of("m").outcomes["ok"] += 1
    new.hear_ingress(IngressNotice("i1", vitals=meter.vitals()), 0.0)
    for boards in ((old, new), (new, old)):
        models = tuple((name, observe(board)) for name, board in zip("ab", boards, strict=True))
        assert samples(Overview(models))[OK] == 2
    meter.of("m").outcomes["ok"] += 1
    assert samples(Overview((("a", None),), meter.vitals()))[OK] == 3, "its own, where there is no ledger"


def test_what_comes_late_takes_nothing_back() -> None:
    """A process that was stopped (SIGSTOP) reads what was sent to it meanwhile in any order."""
    board, meter = Board(), IngressMeter("i1")
    notices, reports = [], []
    for number in range(1, 4):
        meter.of("m").outcomes["ok"] += 1
        notices.append(IngressNotice("i1", vitals=meter.vitals()))
        reports.append(report(sequence=number, vitals=replica_vitals(output_tokens=number)))
    shown = []
    for index in (0, 2, 1):
        board.hear_ingress(notices[index], float(index))
        board.hear_replica(reports[index], float(index))
        page = samples(Overview((("m", observe(board)),)))
        shown.append((page[OK], page["headroom_output_tokens_total", R1]))
    assert shown == [(1, 1), (3, 3), (3, 3)]
    board.hear_replica(report(epoch=2, sequence=1, vitals=replica_vitals(output_tokens=0)), 3.0)
    board.hear_replica(reports[2], 3.0)
    assert samples(Overview((("m", observe(board)),)))["headroom_output_tokens_total", R1] == 0, "it started anew"


def test_an_empty_service_has_a_page() -> None:
    empty = Overview((("m", None),), IngressVitals("i1", 1, ()))
    assert samples(empty) == {("headroom_ledger_up", (("model", "m"),)): 0}
