"""Counts what an ingress sees of its requests."""

from __future__ import annotations

from collections import Counter

from deployments.metrics.histogram import LATENCY_BOUNDS, TOKEN_BOUNDS, Histogram
from deployments.metrics.vitals import IngressCounts, IngressVitals


class ModelMeter:
    """One model's requests."""

    def __init__(self, model: str) -> None:
        self._model = model
        self.outcomes: Counter[str] = Counter()
        self.first_token = Histogram(LATENCY_BOUNDS)
        self.token_gaps = Histogram(TOKEN_BOUNDS)
        self.queue = Histogram(LATENCY_BOUNDS)

    def counts(self) -> IngressCounts:
        """So far."""
        return IngressCounts(
            self._model,
            tuple(sorted(self.outcomes.items())),
            self.first_token.buckets(),
            self.token_gaps.buckets(),
            self.queue.buckets(),
        )


class IngressMeter:
    """All requests of one ingress process. For one event loop.

    Args:
        ingress_id: unique among the ingress processes.
    """

    def __init__(self, ingress_id: str) -> None:
        self._ingress_id = ingress_id
        self._models: dict[str, ModelMeter] = {}
        self._sequence = 0

    def of(self, model: str | None) -> ModelMeter:
        """The meter of a served model; of None, that of requests that named none."""
        name = model or ""
        if name not in self._models:
            self._models[name] = ModelMeter(name)
        return self._models[name]

    def vitals(self) -> IngressVitals:
        """So far."""
        self._sequence += 1
        return IngressVitals(self._ingress_id, self._sequence, tuple(meter.counts() for meter in self._models.values()))
