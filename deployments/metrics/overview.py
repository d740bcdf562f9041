"""Everything that the page shows, put together from what each model's ledger observed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from deployments.metrics.board import Observation
from deployments.metrics.vitals import IngressCounts, IngressVitals, ReplicaVitals
from deployments.routing.view import ReplicaView


@dataclass(frozen=True, slots=True)
class ReplicaRow:
    """One replica: what its ledger knows of it, and what it said of itself."""

    model: str
    view: ReplicaView
    vitals: ReplicaVitals | None
    """None until the first report that has them."""

    @property
    def labels(self) -> tuple[str, str, str]:
        """Model, pool, replica."""
        return self.model, self.view.pool, self.view.replica_id


@dataclass(frozen=True, slots=True)
class Overview:
    """All models of one service."""

    models: tuple[tuple[str, Observation | None], ...]
    """By name; None where the ledger does not answer."""
    own: IngressVitals | None = None
    """Of the ingress that puts the page together, as long as no ledger ever answered it."""

    @property
    def observed(self) -> Iterator[tuple[str, Observation]]:
        """Models whose ledger answers."""
        return ((model, seen) for model, seen in self.models if seen is not None)

    @property
    def replicas(self) -> Iterator[ReplicaRow]:
        """Every replica that a ledger knows."""
        for model, seen in self.observed:
            for view in seen.view.replicas:
                yield ReplicaRow(model, view, seen.replicas.get(view.replica_id))

    @property
    def ingresses(self) -> Iterator[tuple[str, IngressCounts]]:
        """(ingress id, one model's counts there).

        An ingress tells every ledger of all its models: the newest counts. What it knows of itself is newer still, and
        not shown beside or in place of that: once the ledger is back, or another ingress answers, counters would go
        back.
        """
        newest = {} if self.own is None else {self.own.ingress_id: self.own}
        for _, seen in self.observed:
            for vitals in seen.ingresses:
                if vitals.ingress_id not in newest or newest[vitals.ingress_id].sequence < vitals.sequence:
                    newest[vitals.ingress_id] = vitals
        return ((key, counts) for key, vitals in newest.items() for counts in vitals.models)
