"""Snapshots of the ledger: plain values for readiness, dashboards, autoscaling and tests."""

from __future__ import annotations

from dataclasses import dataclass

from deployments.routing.account import ReplicaAccount
from deployments.routing.forecast import ForecastError


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """One replica in a snapshot; counts are blocks."""

    replica_id: str
    pool: str
    epoch: int
    block_size: int
    capacity_blocks: int
    charged_blocks: int
    held_blocks: int
    promises: int
    sellable: bool
    alive: bool = True
    """Its heartbeats come, and no call found it gone."""
    draining: bool = False
    silent_s: float = 0.0
    """Since its last report."""


@dataclass(frozen=True, slots=True)
class LedgerView:
    """The ledger at one instant: for readiness, dashboards and tests."""

    model: str
    epoch: int
    warming: bool
    waiting: int
    waiting_tokens: int
    expected_output_tokens: int
    replicas: tuple[ReplicaView, ...]
    forecast: ForecastError
    """Of the waits forecast to those who queued, and then were granted."""
    starts_on_demand: bool = False
    """A pool may have no replica, and gets one when a request comes."""
    waiting_by_pool: tuple[tuple[str | None, int], ...] = ()
    """(pool that they insist on, requests); None: any pool."""

    @property
    def ready(self) -> bool:
        """Whether a request would be served: a replica can take work, or one is started for it."""
        return self.starts_on_demand or any(replica.sellable for replica in self.replicas)


def view_of(account: ReplicaAccount, *, sellable: bool, now: float) -> ReplicaView:
    """One replica's view."""
    state = account.state
    return ReplicaView(
        replica_id=state.replica_id,
        pool=state.pool,
        epoch=state.epoch,
        block_size=state.block_size,
        capacity_blocks=state.capacity_blocks,
        charged_blocks=account.charged_blocks,
        held_blocks=account.held_blocks,
        promises=len(account.promises),
        sellable=sellable,
        alive=account.alive,
        draining=state.draining,
        silent_s=now - account.heard_at,
    )
