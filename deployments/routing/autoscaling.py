"""How many replicas a pool gets: forecast KV demand over what a replica holds. A pure core, and Serve's policy.

demand = tokens that the replicas hold or have been granted + tokens of the grants that wait for the pool
up     = ceil(demand / (replica * target))
down   = ceil(demand / (replica * (target - slack)))

A pool grows to `up` and shrinks to `down`; in between it stays, so that one request more or less doesn't start or stop
a replica. Serve's own delays say for how long either must be asked for before it happens.

Serve's controller runs the policy from a copy of this module (cloudpickle, by value): it imports nothing of ours.
Written against Ray 2.60 (pinned in pyproject.toml).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

HELD = "headroom_held_tokens"
CAPACITY = "headroom_capacity_tokens"
WAITING = "headroom_waiting_tokens"
"""What each replica tells the controller; the last is the whole pool's, by the ledger's last answer."""

INTERVAL_S = 1.0
"""How often replicas tell, and ingresses how many of their calls wait for a first replica."""
WINDOW_S = 2.0
"""Serve averages those calls over it, so a pool could be started again by calls that ended so long ago."""


def desired_replicas(
    *,
    target: int,
    running: int,
    held_tokens: int,
    waiting_tokens: int,
    replica_tokens: int,
    target_percent: int,
    slack_percent: int,
) -> int:
    """Replicas that the demand asks for.

    While requests wait it is one more than are running at least: there may be room enough in all, and not in any one.

    Args:
        target: replicas that were asked for last.
        running: replicas that run.
        held_tokens: KV tokens held or granted on all of them.
        waiting_tokens: KV tokens of the grants that wait for the pool.
        replica_tokens: KV tokens that one replica holds, positive.
        target_percent: of its KV cache that is to be in use, 1 to 100.
        slack_percent: less than that many percent less, the pool shrinks; under `target_percent`.
    """
    demand = max(0, held_tokens) + waiting_tokens
    up = _ceil(100 * demand, replica_tokens * target_percent)
    if waiting_tokens:
        up = max(up, running + 1)
    down = max(up, _ceil(100 * demand, replica_tokens * (target_percent - slack_percent)))
    return max(up, min(target, down))


class KvDemandPolicy:
    """Serve calls it some ten times a second for each pool, and applies the pool's limits and delays to the answer.

    Args:
        target_percent: as in `desired_replicas`.
        slack_percent: likewise.
    """

    def __init__(self, target_percent: int, slack_percent: int) -> None:
        self._target_percent = target_percent
        self._slack_percent = slack_percent

    def __call__(self, ctx: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """The number of replicas, and no state of our own.

        Without a word from any replica, the number stays while some run, and is none otherwise: the calls of
        ingresses that want a first replica are counted by Serve before this policy is asked.
        """
        told = ctx.raw_metrics or {}
        capacity = _newest(told.get(CAPACITY, {}))
        if not capacity:
            return (ctx.target_num_replicas if ctx.current_num_replicas else 0), {}
        waiting = max(_newest(told.get(WAITING, {})).values(), default=(0.0, 0))
        desired = desired_replicas(
            target=ctx.target_num_replicas,
            running=ctx.current_num_replicas,
            held_tokens=sum(tokens for _, tokens in _newest(told.get(HELD, {})).values()),
            waiting_tokens=waiting[1],
            replica_tokens=max(1, sum(tokens for _, tokens in capacity.values()) // len(capacity)),
            target_percent=self._target_percent,
            slack_percent=self._slack_percent,
        )
        return desired, {}


def autoscaling_config(
    *,
    min_replicas: int,
    max_replicas: int,
    target_percent: int,
    slack_percent: int,
    upscale_delay_s: float,
    downscale_delay_s: float,
    downscale_to_zero_delay_s: float | None,
) -> AutoscalingConfig:
    """What a pool's deployment passes as `autoscaling_config`."""
    policy = AutoscalingPolicy(
        policy_function=f"{__name__}:{KvDemandPolicy.__name__}",
        policy_kwargs={"target_percent": target_percent, "slack_percent": slack_percent},
    )
    return AutoscalingConfig(
        min_replicas=min_replicas,
        max_replicas=max_replicas,
        upscale_delay_s=upscale_delay_s,
        downscale_delay_s=downscale_delay_s,
        downscale_to_zero_delay_s=downscale_to_zero_delay_s,
        metrics_interval_s=INTERVAL_S,
        look_back_period_s=WINDOW_S,
        policy=policy,
    )


def stats(*, held_tokens: int, capacity_tokens: int, waiting_tokens: int) -> dict[str, int]:
    """What a replica answers to Serve's `record_autoscaling_stats`."""
    return {HELD: held_tokens, CAPACITY: capacity_tokens, WAITING: waiting_tokens}


def _newest(series: Mapping[Any, Any]) -> dict[Any, tuple[float, int]]:
    """(time, value) of each replica's last point."""
    return {replica: (points[-1].timestamp, int(points[-1].value)) for replica, points in series.items() if points}


def _ceil(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)
