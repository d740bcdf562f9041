"""Snapshots of the ledger: plain values for readiness, dashboards, autoscaling and tests."""

from __future__ import annotations

from dataclasses import dataclass


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

    @property
    def ready(self) -> bool:
        """Whether a replica can take work."""
        return any(replica.sellable for replica in self.replicas)
