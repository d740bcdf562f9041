"""Why a request is not served: each refusal says what was needed, what was there, and which knob to turn. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deployments.protocol import Refusal, ReserveRequest, mismatch
from deployments.routing.growth import ScaledPool
from deployments.routing.policy import Candidate, Size, fits_ever


@dataclass(frozen=True, slots=True)
class LedgerConfig:
    """What a ledger is told at its start. Durations in seconds."""

    model: str
    pools: tuple[str, ...] = ("default",)
    expected_replicas: int = 1
    """A new ledger waits one lease time for this many replicas before it sells or refuses."""
    scaled: tuple[ScaledPool, ...] = ()
    """Those of the pools whose replicas come and go; a request may wait for the first one of such a pool."""
    queue_limit: int = 1024
    tenant_weights: tuple[tuple[str, int], ...] = ()
    """(tenant, weight) of tenants that get more or less than others when requests wait; 1 for those not named."""
    grant_ttl_s: float = 10.0
    """How long a grant can be taken up."""
    lease_s: float = 5.0
    """An ingress that sends nothing for this long is gone; its waiting requests are dropped."""
    silence_s: float = 3.0
    """A replica that reports nothing for this long is gone until it reports again."""


def malformed(config: LedgerConfig, request: ReserveRequest) -> Refusal | None:
    """A protocol or a pool that this ledger doesn't know."""
    if (reason := mismatch(request, "the ledger")) is not None:
        return Refusal(request.request_id, "version", reason, retry_after_s=max(1, int(config.lease_s)))
    if request.pool is not None and request.pool not in config.pools:
        text = f"model {config.model} has no pool {request.pool!r}; it has {', '.join(config.pools)}"
        return Refusal(request.request_id, "unknown_pool", text)
    return None


def hopeless(
    config: LedgerConfig,
    request: ReserveRequest,
    size: Size,
    known: Sequence[Candidate],
    *,
    alive: bool,
    absent: Sequence[Candidate] = (),
    unheard: bool = False,
) -> Refusal | None:
    """No replica is there, or none that is known could hold the request even if it were empty.

    Only what no pool holds is too long: a client doesn't come again with that.

    Args:
        config: of the ledger.
        request: the request.
        size: its size.
        known: replicas of its pool, those that fell silent a moment ago included: what fits one of them is worth
            waiting for, and must not be told that it is too long; and those that could be started.
        alive: whether any of them is alive, is merely silent, or could be started.
        absent: the last replica of each of its pools, however long ago it fell silent.
        unheard: whether one of its pools never had a replica, so that nobody knows what it holds.
    """
    if not alive:
        return _nobody(config, request, "")
    if any(fits_ever(replica, size) for replica in known):
        return None
    if unheard or any(fits_ever(replica, size) for replica in absent):
        return _nobody(config, request, f" that holds {size.prompt_tokens + size.max_tokens} tokens")
    known = [*known, *absent]
    context = max(replica.max_context for replica in known)
    if request.prompt_tokens + request.max_tokens > context:
        text = (
            f"{request.prompt_tokens} prompt tokens and {request.max_tokens} max_tokens need "
            f"{request.prompt_tokens + request.max_tokens} tokens; the longest context of {config.model} is "
            f"{context} tokens. Shorten the prompt or lower max_tokens"
        )
    else:
        capacity = max(replica.capacity_blocks * replica.block_size for replica in known)
        text = (
            f"{request.prompt_tokens} prompt tokens and {request.max_tokens} max_tokens need "
            f"{request.prompt_tokens + request.max_tokens} tokens of KV cache; the largest replica of "
            f"{config.model} has {capacity}. Shorten the prompt or lower max_tokens"
        )
    return Refusal(request.request_id, "too_long", text)


def _nobody(config: LedgerConfig, request: ReserveRequest, which: str) -> Refusal:
    where = f"model {config.model}" + (f", pool {request.pool}," if request.pool else "")
    text = f"no replica of {where}{which} is alive. Try again, or see the service's log"
    return Refusal(request.request_id, "no_replica", text, retry_after_s=max(1, int(config.lease_s)))


def full(config: LedgerConfig, request: ReserveRequest, waiting: int, retry_after_s: int) -> Refusal:
    """The queue takes no more."""
    text = f"{waiting} requests wait for {config.model} and queue_limit is {config.queue_limit}"
    return _busy(Refusal(request.request_id, "queue_full", text, retry_after_s))


def displaced(config: LedgerConfig, request: ReserveRequest, waiting: int, retry_after_s: int) -> Refusal:
    """The queue is full, and the last of the tenant most over its share makes room for another tenant."""
    text = (
        f"{waiting} requests wait for {config.model}, queue_limit is {config.queue_limit}, and this tenant has "
        f"more than its share of it, which others need now"
    )
    return _busy(Refusal(request.request_id, "queue_full", text, retry_after_s))


def late(config: LedgerConfig, request: ReserveRequest, size: Size, retry_after_s: int, *, there: bool) -> Refusal:
    """The deadline passed.

    Args:
        config: of the ledger.
        request: the request.
        size: its size.
        retry_after_s: the forecast.
        there: whether a replica takes requests.
    """
    did = f"had room for one more request of {size.grant_tokens} tokens" if there else "was ready"
    text = f"no replica of {config.model} {did} within {request.wait_limit_s:g} s (wait_limit_s)"
    return _busy(Refusal(request.request_id, "deadline", text, retry_after_s))


def lapsed(config: LedgerConfig, request_id: str, ingress_id: str) -> Refusal:
    """The ingress that asked is gone; nobody reads this answer, unless it was merely slow."""
    text = f"ingress {ingress_id} sent nothing for {config.lease_s:g} s, so its waiting requests are dropped"
    return _busy(Refusal(request_id, "deadline", text, retry_after_s=max(1, int(config.lease_s))))


def _busy(refusal: Refusal) -> Refusal:
    text = f"{refusal.message}. Try again in about {refusal.retry_after_s} s"
    return Refusal(refusal.request_id, refusal.kind, text, refusal.retry_after_s)
