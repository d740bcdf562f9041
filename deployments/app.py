"""What `serve_config.yaml` imports: settings in, the Serve application out. Wiring only."""

from __future__ import annotations

from typing import Any

import ray
from ray import serve
from ray.serve import Application

from deployments.ingress import Ingress
from deployments.replica import ReplicaDeployment
from deployments.routing.autoscaling import autoscaling_config
from deployments.routing.growth import ScaledPool
from deployments.routing.ledger_deployment import deployment_name, ledger_application
from deployments.routing.refusals import LedgerConfig
from deployments.routing.router import router_config
from deployments.settings import ModelSettings, PoolSettings, Settings, parse_settings

ACTOR_CPUS = 0.01
"""What each actor asks of Ray: Serve's default of one CPU per actor would wait for ever on a small machine."""

STATUS_CALLS = 16
"""Calls of a replica at once besides requests: status, a wait for the first replica, requests that just ended."""


def build(args: dict[str, Any]) -> Application:
    """The application of `args`, as validated by `Settings`.

    Raises:
        ConfigError: a wrong key or value, by name.
    """
    settings = parse_settings(args)
    ledgers = {
        model.name: ledger_application(_ledger_config(model), settings.api.resources) for model in settings.models
    }
    pools = {
        model.name: {pool.name: _pool(settings, model, pool, ledgers[model.name]) for pool in model.pools}
        for model in settings.models
    }
    ingress = serve.deployment(
        name="ingress",
        num_replicas=settings.api.replicas,
        max_ongoing_requests=settings.api.max_ongoing_requests,
        ray_actor_options={"num_cpus": ACTOR_CPUS, "resources": dict(settings.api.resources)},
        health_check_period_s=2,
        health_check_timeout_s=30,
        # An answer can't move to another ingress: one that Serve stops finishes all, and its successor is there first.
        graceful_shutdown_timeout_s=settings.api.request_timeout_s,
        max_surge_percent=100,
    )(Ingress)
    return ingress.bind(settings, ledgers, pools)


def pool_deployment_name(model: str, pool: str) -> str:
    """The name of a pool's deployment on the Ray dashboard."""
    return deployment_name(f"{model}-{pool}").removeprefix("ledger-")


def _ledger_config(model: ModelSettings) -> LedgerConfig:
    return LedgerConfig(
        model=model.name,
        pools=tuple(pool.name for pool in model.pools),
        expected_replicas=sum(pool.fewest_replicas for pool in model.pools),
        scaled=tuple(_scaled(pool) for pool in model.pools if pool.autoscaling),
        queue_limit=model.queue_limit,
        tenant_weights=tuple(sorted(model.tenant_weights.items())),
    )


def _scaled(pool: PoolSettings) -> ScaledPool:
    assert pool.autoscaling is not None, f"pool {pool.name} has a fixed number of replicas"
    scaling = pool.autoscaling
    return ScaledPool(pool.name, scaling.min_replicas, scaling.max_replicas, scaling.upscale_delay_s)


def _number(pool: PoolSettings) -> dict[str, Any]:
    """How many replicas Serve is asked for."""
    if pool.autoscaling is None:
        return {"num_replicas": pool.replicas}
    return {"autoscaling_config": autoscaling_config(**pool.autoscaling.model_dump())}


def _pool(settings: Settings, model: ModelSettings, pool: PoolSettings, ledger: Application) -> Application:
    deployment = serve.deployment(
        name=pool_deployment_name(model.name, pool.name),
        # The ledger decides who waits, and knows of `max_requests`; Serve must never reject what it has granted.
        max_ongoing_requests=pool.max_requests + STATUS_CALLS,
        ray_actor_options=_actor_options(pool),
        request_router_config=router_config(),
        logging_config={"enable_access_log": False},
        health_check_period_s=2,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=pool.drain_s,
        max_surge_percent=100 if pool.surge else 0,
        **_number(pool),
    )(ReplicaDeployment)
    return deployment.bind(model, pool, _replicas_on_cpu(settings), ledger)


def _actor_options(pool: PoolSettings) -> dict[str, Any]:
    """What one replica asks of Ray."""
    options: dict[str, Any] = {"num_cpus": pool.cpus or ACTOR_CPUS, "num_gpus": _gpus(pool)}
    if pool.accelerator_type:
        options["accelerator_type"] = pool.accelerator_type
    if pool.resources:
        options["resources"] = dict(pool.resources)
    return options


def _gpus(pool: PoolSettings) -> int:
    """GPUs that one replica asks Ray for: all its stages, or none where the pool runs on virtual CPU devices."""
    if pool.device == "auto" and not pool.accelerator_type:
        return pool.stage_count if ray.cluster_resources().get("GPU", 0) > 0 else 0
    return 0 if pool.device == "cpu" else pool.stage_count


def _replicas_on_cpu(settings: Settings) -> int:
    """Replicas that share the cores of one machine, as far as the settings tell."""
    return sum(pool.most_replicas for model in settings.models for pool in model.pools)
