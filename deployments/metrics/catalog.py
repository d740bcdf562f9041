"""Every metric, declared once: its name, type, labels and meaning, and where its values come from.

`docs/metrics.md` has the same table; `python -m deployments.metrics` prints it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from deployments.metrics.board import Observation
from deployments.metrics.histogram import Buckets
from deployments.metrics.overview import Overview, ReplicaRow
from deployments.metrics.vitals import IngressCounts, ReplicaVitals
from deployments.protocol import RefusalKind

Kind = Literal["gauge", "counter", "histogram"]
Value = float | Buckets
Row = tuple[tuple[str, ...], Value]


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric."""

    name: str
    kind: Kind
    labels: tuple[str, ...]
    meaning: str
    """One sentence; becomes the page's HELP."""
    rows: Callable[[Overview], Iterable[Row]]
    """(label values, value) of every series."""


def _model(name: str, meaning: str, read: Callable[[Observation], Value], kind: Kind = "gauge") -> Metric:
    def rows(overview: Overview) -> Iterator[Row]:
        return (((model,), read(seen)) for model, seen in overview.observed)

    return Metric(name, kind, ("model",), meaning, rows)


def _view(name: str, meaning: str, read: Callable[[ReplicaRow], float]) -> Metric:
    """A gauge of what the ledger knows of a replica."""

    def rows(overview: Overview) -> Iterator[Row]:
        return ((replica.labels, read(replica)) for replica in overview.replicas)

    return Metric(name, "gauge", ("model", "pool", "replica"), meaning, rows)


def _replica(name: str, meaning: str, read: Callable[[ReplicaVitals], Value], kind: Kind = "gauge") -> Metric:
    """What a replica says of itself."""

    def rows(overview: Overview) -> Iterator[Row]:
        return ((replica.labels, read(replica.vitals)) for replica in overview.replicas if replica.vitals is not None)

    return Metric(name, kind, ("model", "pool", "replica"), meaning, rows)


def _stage(name: str, meaning: str, read: Callable[[ReplicaVitals], Iterable[float]], kind: Kind = "gauge") -> Metric:
    """What a replica says of each of its stages."""

    def rows(overview: Overview) -> Iterator[Row]:
        for replica in overview.replicas:
            if replica.vitals is not None:
                for stage, value in enumerate(read(replica.vitals)):
                    yield (*replica.labels, str(stage)), value

    return Metric(name, kind, ("model", "pool", "replica", "stage"), meaning, rows)


def _ingress(name: str, meaning: str, read: Callable[[IngressCounts], Buckets]) -> Metric:
    """A histogram of one model's requests at one ingress."""

    def rows(overview: Overview) -> Iterator[Row]:
        return (((counts.model, ingress), read(counts)) for ingress, counts in overview.ingresses if counts.model)

    return Metric(name, "histogram", ("model", "ingress"), meaning, rows)


def _ledger_up(overview: Overview) -> Iterator[Row]:
    return (((model,), float(seen is not None)) for model, seen in overview.models)


def _refusals(overview: Overview) -> Iterator[Row]:
    for model, seen in overview.observed:
        counts = dict(seen.refusals)
        for kind in get_args(RefusalKind):
            yield (model, kind), float(counts.get(kind, 0))


def _outcomes(overview: Overview) -> Iterator[Row]:
    for ingress, counts in overview.ingresses:
        for outcome, number in counts.outcomes:
            yield (counts.model, ingress, outcome), float(number)


METRICS: tuple[Metric, ...] = (
    # The ledger
    Metric("headroom_ledger_up", "gauge", ("model",), "1 while the model's ledger answers, else 0.", _ledger_up),
    _model(
        "headroom_replicas_expected",
        "Replicas by the settings; the least where a pool scales.",
        lambda seen: seen.expected_replicas,
    ),
    _model(
        "headroom_replicas_ready",
        "Replicas that are granted requests.",
        lambda seen: sum(replica.sellable for replica in seen.view.replicas),
    ),
    _model("headroom_queue_requests", "Requests that wait for blocks.", lambda seen: seen.view.waiting),
    _model("headroom_queue_tokens", "KV tokens that the waiting requests need.", lambda seen: seen.view.waiting_tokens),
    _model(
        "headroom_expected_output_tokens",
        "Output tokens that a new request is granted room for, at most.",
        lambda seen: seen.view.expected_output_tokens,
    ),
    _model(
        "headroom_queue_waits_total",
        "Requests that waited for blocks and were granted them.",
        lambda seen: seen.view.forecast.requests,
        "counter",
    ),
    _model(
        "headroom_queue_waited_seconds_total",
        "How long they waited, together.",
        lambda seen: seen.view.forecast.waited_ms / 1000,
        "counter",
    ),
    _model(
        "headroom_queue_forecast_error_seconds_total",
        "By how much their forecast waits were wrong, together; Retry-After comes from the same forecast.",
        lambda seen: seen.view.forecast.error_ms / 1000,
        "counter",
    ),
    Metric(
        "headroom_refusals_total",
        "counter",
        ("model", "reason"),
        "Requests that the ledger refused, by why.",
        _refusals,
    ),
    # Replicas, as the ledger sees them
    _view(
        "headroom_replica_ready",
        "1 while the replica is granted requests; 0 while it starts, drains or is silent.",
        lambda replica: float(replica.view.sellable),
    ),
    _view("headroom_kv_blocks", "KV blocks that the replica has.", lambda replica: replica.view.capacity_blocks),
    _view("headroom_kv_block_tokens", "Tokens of one KV block.", lambda replica: replica.view.block_size),
    _view(
        "headroom_kv_blocks_granted",
        "KV blocks granted or, where a request outgrew its grant, held.",
        lambda replica: replica.view.charged_blocks,
    ),
    _view(
        "headroom_headroom_tokens",
        "Tokens of KV cache neither held nor granted; below 0 when requests outgrew their grants.",
        lambda replica: (replica.view.capacity_blocks - replica.view.charged_blocks) * replica.view.block_size,
    ),
    # Replicas, by their own word
    _replica("headroom_kv_blocks_held", "KV blocks in use by requests.", lambda it: it.held_blocks),
    _replica("headroom_kv_blocks_cached", "KV blocks that the prefix cache alone keeps.", lambda it: it.cached_blocks),
    _replica("headroom_requests_running", "Requests in the engine's steps.", lambda it: it.running),
    _replica("headroom_requests_waiting", "Requests taken up that wait in the engine.", lambda it: it.waiting),
    _replica(
        "headroom_preemptions_total",
        "Requests that lost their blocks and were computed again.",
        lambda it: it.preemptions,
        "counter",
    ),
    _replica("headroom_prompt_tokens_total", "Prompt tokens taken in.", lambda it: it.prompt_tokens, "counter"),
    _replica(
        "headroom_cached_prompt_tokens_total",
        "Prompt tokens found in the prefix cache.",
        lambda it: it.cached_tokens,
        "counter",
    ),
    _replica("headroom_output_tokens_total", "Tokens produced.", lambda it: it.output_tokens, "counter"),
    _replica(
        "headroom_step_seconds",
        "Time of an engine step; with several stages, from one step's end to the next's.",
        lambda it: it.steps,
        "histogram",
    ),
    _stage(
        "headroom_stage_busy_seconds_total",
        "Time that the stage computed; the rest of headroom_step_seconds_sum it was idle. Not measured on GPUs.",
        lambda it: it.busy_s,
        "counter",
    ),
    _stage(
        "headroom_gpu_memory_predicted_bytes",
        "What the plan says that the stage's GPU holds; GPUs only.",
        lambda it: it.predicted_bytes,
    ),
    _stage(
        "headroom_gpu_memory_measured_bytes",
        "What is taken on the stage's GPU, by all processes; GPUs only.",
        lambda it: it.measured_bytes,
    ),
    _replica(
        "headroom_grant_blocks_total",
        "KV blocks granted to the requests that ended.",
        lambda it: it.grants.granted,
        "counter",
    ),
    _replica(
        "headroom_grant_blocks_unused_total",
        "Of them, blocks that were never needed.",
        lambda it: it.grants.unused,
        "counter",
    ),
    _replica(
        "headroom_grant_blocks_beyond_total",
        "KV blocks that the requests that ended needed beyond their grants.",
        lambda it: it.grants.beyond,
        "counter",
    ),
    # Ingresses
    Metric(
        "headroom_requests_total",
        "counter",
        ("model", "ingress", "outcome"),
        "HTTP requests by how they ended: ok, client_gone, or the code of the error; no model: none was named.",
        _outcomes,
    ),
    _ingress(
        "headroom_time_to_first_token_seconds",
        "From a request's arrival to its first token, at the ingress.",
        lambda counts: counts.first_token,
    ),
    _ingress(
        "headroom_inter_token_seconds",
        "From one token of a choice to the next, at the ingress; tokens that come together share the time.",
        lambda counts: counts.token_gaps,
    ),
    _ingress(
        "headroom_queue_seconds",
        "From dispatch until a replica has taken up all choices of a request.",
        lambda counts: counts.queue,
    ),
)
