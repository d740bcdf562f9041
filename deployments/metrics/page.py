"""The one page that Prometheus reads."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

from deployments.metrics import catalog
from deployments.metrics.histogram import Buckets
from deployments.metrics.overview import Overview


def render(overview: Overview, accept: str) -> tuple[bytes, str]:
    """The page, and its content type: OpenMetrics where the `Accept` header asks for it, else Prometheus's text."""
    registry = CollectorRegistry()
    registry.register(_Collector(overview))
    try:
        encode, content_type = choose_encoder(accept)
    except (TypeError, ValueError):  # It names a version that is no number.
        encode, content_type = choose_encoder("")
    return encode(registry), content_type


class _Collector(Collector):
    def __init__(self, overview: Overview) -> None:
        self._overview = overview

    def collect(self) -> Iterator[Metric]:
        return (_family(metric, self._overview) for metric in catalog.METRICS)


def _family(metric: catalog.Metric, overview: Overview) -> Metric:
    if metric.kind == "histogram":
        histogram = HistogramMetricFamily(metric.name, metric.meaning, labels=metric.labels)
        for labels, value in metric.rows(overview):
            assert isinstance(value, Buckets)
            histogram.add_metric(labels, _cumulative(value), value.total)
        return histogram
    family = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    made = family(metric.name, metric.meaning, labels=metric.labels)
    for labels, value in metric.rows(overview):
        assert not isinstance(value, Buckets)
        made.add_metric(labels, value)
    return made


def _cumulative(buckets: Buckets) -> list[tuple[str, float]]:
    """(upper bound, values up to it)."""
    bounds = [*map(str, buckets.bounds), "+Inf"]
    return list(zip(bounds, map(float, accumulate(buckets.counts)), strict=True))
