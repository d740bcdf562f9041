"""What the processes of one model last said of themselves, kept beside the ledger. Pure; time comes from the caller."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from deployments.metrics.recent import RecentRate
from deployments.metrics.vitals import IngressVitals, ReplicaVitals
from deployments.protocol import IngressNotice, Refusal, RefusalKind, ReplicaState
from deployments.routing.view import LedgerView
from placement.outline import Outline

FORGET_S = 30.0
"""Of silence: a process that said nothing for so long is not shown any more."""


@dataclass(frozen=True, slots=True)
class Observation:
    """One model at one instant."""

    view: LedgerView
    expected_replicas: int
    """By the settings."""
    replicas: dict[str, ReplicaVitals]
    """By replica id, of those that the view has."""
    ingresses: tuple[IngressVitals, ...]
    refusals: tuple[tuple[RefusalKind, int], ...]
    """Since the ledger's start."""
    outlines: dict[str, Outline] = field(default_factory=dict)
    """Plans by replica id, of those that have told it."""
    output_rates: dict[str, float] = field(default_factory=dict)
    """Tokens per second by replica id, over the last seconds; without those that have been heard once only."""


class Board:
    """Takes in what comes along with reports and notices, and counts refusals."""

    def __init__(self) -> None:
        self._replicas: dict[str, tuple[ReplicaVitals, float]] = {}
        self._newest: dict[str, tuple[tuple[int, int], float]] = {}
        """(epoch, sequence) of each replica's newest report with vitals."""
        self._ingresses: dict[str, tuple[IngressVitals, float]] = {}
        self._outlines: dict[str, tuple[Outline, float]] = {}
        self._rates: dict[str, tuple[RecentRate, float]] = {}
        self._refusals: Counter[RefusalKind] = Counter()

    def hear_replica(self, state: ReplicaState, now: float) -> None:
        """A replica reported; not every report has vitals, and one that comes late tells nothing."""
        key, order = state.replica_id, (state.epoch, state.sequence)
        if state.vitals is None or (key in self._newest and order < self._newest[key][0]):
            return
        self._newest[key] = (order, now)
        self._replicas[key] = (state.vitals, now)
        if state.vitals.outline is not None:
            self._outlines[key] = (state.vitals.outline, now)
        rate, _ = self._rates.get(key, (RecentRate(), now))
        rate.add(state.vitals.output_tokens, now)
        self._rates[key] = (rate, now)

    def hear_ingress(self, notice: IngressNotice, now: float) -> None:
        """An ingress gave notice; not every notice has vitals, and one that comes late tells nothing."""
        vitals, known = notice.vitals, self._ingresses.get(notice.ingress_id)
        if vitals is not None and (known is None or known[0].sequence <= vitals.sequence):
            self._ingresses[notice.ingress_id] = (vitals, now)
        self._forget(now)

    def count(self, outcome: object) -> None:
        """Count an answer, if it is a refusal."""
        if isinstance(outcome, Refusal):
            self._refusals[outcome.kind] += 1

    def observe(self, view: LedgerView, expected_replicas: int, now: float) -> Observation:
        """Everything at once, without those that fell silent."""
        self._forget(now)
        known = {replica.replica_id for replica in view.replicas}
        return Observation(
            view=view,
            expected_replicas=expected_replicas,
            replicas={key: vitals for key, (vitals, _) in self._replicas.items() if key in known},
            ingresses=tuple(vitals for vitals, _ in self._ingresses.values()),
            refusals=tuple(sorted(self._refusals.items())),
            outlines={key: outline for key, (outline, _) in self._outlines.items() if key in known},
            output_rates={
                key: per_s
                for key, (rate, _) in self._rates.items()
                if key in known and (per_s := rate.per_s(now)) is not None
            },
        )

    def _forget(self, now: float) -> None:
        for said in (self._replicas, self._newest, self._ingresses, self._outlines, self._rates):
            for key in [key for key, (_, heard_at) in said.items() if now - heard_at > FORGET_S]:
                del said[key]
