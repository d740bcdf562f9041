"""The wiring: which Serve deployments come of which settings. Nothing is started."""

from __future__ import annotations

from typing import Any

import pytest
from ray.serve import Application

from deployments import app
from deployments.errors import ConfigError
from deployments.ingress import Ingress
from deployments.routing.growth import ScaledPool
from deployments.settings import PoolSettings, Settings


def model(name: str = "m", *pools: dict[str, Any], **options: Any) -> dict[str, Any]:
    chosen = pools or ({},)
    return {"name": name, "source": "demo", "pools": [{"device": "cpu", **pool} for pool in chosen], **options}


def build(*models: dict[str, Any], **api: Any) -> Any:
    """The ingress's deployment as bound."""
    return bound(app.build({"models": list(models), "api": api}))


def bound(application: Application) -> Any:
    return application._bound_deployment


def parts(ingress: Any) -> tuple[Settings, dict[str, Any], dict[str, dict[str, Any]]]:
    """What the ingress is constructed with: settings, ledgers and pools, each as its deployment."""
    settings, ledgers, pools = ingress.init_args
    return (
        settings,
        {name: bound(ledger) for name, ledger in ledgers.items()},
        {name: {pool: bound(each) for pool, each in mine.items()} for name, mine in pools.items()},
    )


def test_ingress_ledger_and_pools() -> None:
    two = ({"name": "small", "replicas": 3, "cpus": 0.5, "max_sequences": 8}, {"name": "large"})
    weights = {"b": 2, "a": 1}
    ingress = build(model("m", *two, queue_limit=5, tenant_weights=weights), replicas=2, max_ongoing_requests=77)
    settings, ledgers, pools = parts(ingress)
    assert isinstance(settings, Settings)
    assert (ingress.name, ingress.num_replicas, ingress.max_ongoing_requests) == ("ingress", 2, 77)
    assert ingress.ray_actor_options["num_cpus"] == app.ACTOR_CPUS
    (config,) = ledgers["m"].init_args
    assert (config.model, config.pools, config.expected_replicas, config.queue_limit) == ("m", ("small", "large"), 4, 5)
    assert config.tenant_weights == (("a", 1), ("b", 2))
    small, large = pools["m"]["small"], pools["m"]["large"]
    assert (small.name, small.num_replicas, large.name, large.num_replicas) == ("m-small", 3, "m-large", 1)
    assert small.ray_actor_options["num_cpus"] == 0.5
    assert large.ray_actor_options["num_cpus"] == app.ACTOR_CPUS
    pool = small.init_args[1]
    assert pool.max_requests == 16
    assert small.max_ongoing_requests == 16 + app.STATUS_CALLS, "Serve never rejects what the ledger has granted"
    router = small._deployment_config.request_router_config.request_router_class
    assert router == "deployments.routing.router.GrantRouter"


def test_replicas_share_the_machine_and_their_models_ledger() -> None:
    _, ledgers, pools = parts(build(model("a", {"replicas": 2}), model("b", {"name": "x"}, {"name": "y"})))
    for name, of_model in pools.items():
        for pool_name, deployment in of_model.items():
            served, pool, replicas_here, ledger = deployment.init_args
            assert (served.name, pool.name, replicas_here) == (name, pool_name, 4)
            assert bound(ledger) is ledgers[name]


def test_names_with_slashes_become_names_that_serve_allows() -> None:
    _, ledgers, pools = parts(build(model("org/some.model", {"name": "a/b"})))
    assert ledgers["org/some.model"].name == "ledger-org--some.model"
    assert pools["org/some.model"]["a/b"].name == "org--some.model-a--b"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"models": [{"name": "m", "sorce": "demo"}]}, r"unknown key models\.0\.sorce; did you mean source\?"),
        ({"models": [{"name": "m"}]}, r"models\.0\.source is missing"),
        ({"models": [model(pool_count=3)]}, r"unknown key models\.0\.pool_count"),
        ({"models": [model("m", {"stages": 0})]}, r"models\.0\.pools\.0\.stages"),
        ({"models": [model("m", {"accelerator_type": "L4"})]}, "accelerator_type is L4, but device is cpu"),
        ({"models": [model("m", {"resources": {"GPU": 1}})]}, "resources are Ray's custom ones, not GPU"),
        ({"models": [model("m", {"resources": {"x": 0}})]}, r"resources\.x"),
        ({"models": [model("m", {"goal": "speed"})]}, r"pools\.0\.goal"),
        ({"models": []}, "models"),
        ({"models": [model("m", {"replicas": 1, "autoscaling": {"max_replicas": 2}})]}, "both given"),
        (
            {"models": [model("m", {"autoscaling": {"min_replicas": 1}})]},
            r"pools\.0\.autoscaling\.max_replicas is missing",
        ),
        ({"models": [model("m", {"autoscaling": {"min_replicas": 3, "max_replicas": 2}})]}, "2, under min_replicas, 3"),
        ({"models": [model("m", {"autoscaling": {"max_replica": 2}})]}, "did you mean max_replicas"),
        (
            {"models": [model("m", {"autoscaling": {"max_replicas": 2, "target_percent": 20, "slack_percent": 20}})]},
            "it must be under target_percent",
        ),
        ({"models": [model("same"), model("same")]}, r"names and aliases must differ: \['same'\]"),
    ],
)
def test_a_wrong_key_is_named(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        app.build(args)


@pytest.mark.parametrize(
    ("device", "stages", "cluster_gpus", "asked"),
    [("cpu", 2, 8, 0), ("cuda", 2, 0, 2), ("auto", 2, 8, 2), ("auto", 2, 1, 2), ("auto", 1, 0, 0)],
)
def test_gpus_asked_of_ray(
    device: str, stages: int, cluster_gpus: int, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app.ray, "cluster_resources", lambda: {"CPU": 2.0, "GPU": float(cluster_gpus)})
    _, _, pools = parts(build(model("m", {"device": device, "stages": stages})))
    assert pools["m"]["default"].ray_actor_options.get("num_gpus", 0) == asked


def test_a_pool_asks_for_its_kind_of_gpu_and_its_resources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app.ray, "cluster_resources", lambda: {"CPU": 2.0})
    pools = (
        {"name": "a", "device": "auto", "stages": 2, "accelerator_type": "L4"},
        {"name": "b", "resources": {"x": 1}},
    )
    _, _, deployments = parts(build(model("m", *pools)))
    a, b = (deployments["m"][name].ray_actor_options for name in "ab")
    assert (a["num_gpus"], a["accelerator_type"]) == (2, "L4"), "a kind of GPU is a GPU, on whatever node it is"
    assert "resources" not in a or not a["resources"]
    assert b["resources"] == {"x": 1}
    assert "accelerator_type" not in b


def test_a_pool_that_follows_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app.ray, "cluster_resources", lambda: {"CPU": 2.0})
    scaling = {"min_replicas": 0, "max_replicas": 3, "target_percent": 70, "upscale_delay_s": 5}
    pools = ({"name": "small", "autoscaling": scaling}, {"name": "large", "replicas": 2})
    ingress = build(model("m", *pools), resources={"front": 0.5})
    _, ledgers, deployments = parts(ingress)
    (config,) = ledgers["m"].init_args
    assert config.expected_replicas == 2
    assert config.scaled == (ScaledPool("small", 0, 3, 5.0),)
    made = deployments["m"]["small"]._deployment_config.autoscaling_config
    assert (made.min_replicas, made.max_replicas, made.upscale_delay_s, made.downscale_delay_s) == (0, 3, 5, 300)
    assert made.policy.policy_kwargs == {"target_percent": 70, "slack_percent": 20}
    assert deployments["m"]["small"].init_args[2] == 5, "threads are shared by as many as there may be"
    assert deployments["m"]["large"]._deployment_config.autoscaling_config is None
    for each in (ingress, ledgers["m"]):
        assert each.ray_actor_options["resources"] == {"front": 0.5}


def test_the_ingress_class_is_the_one_served() -> None:
    assert build(model()).func_or_class.__name__ == Ingress.__name__


def test_pool_settings_reach_the_replica() -> None:
    _, _, pools = parts(build(model("m", {"quantization": "int8", "stages": 2, "max_memory": {"0": "600MB"}})))
    _, pool, _, _ = pools["m"]["default"].init_args
    assert pool == PoolSettings(device="cpu", quantization="int8", stages=2, max_memory={0: "600MB"})


def test_what_is_stopped_finishes_its_streams_and_successors_come_first_where_asked() -> None:
    ingress = build(model("m", {"name": "a", "drain_s": 7}, {"name": "b", "surge": True}))
    _, _, pools = parts(ingress)
    a, b = (pools["m"][name]._deployment_config for name in "ab")
    assert a.graceful_shutdown_timeout_s == 7
    assert (a.max_surge_percent, b.max_surge_percent) == (0, 100)
    assert ingress._deployment_config.graceful_shutdown_timeout_s == 600.0  # api.request_timeout_s
    assert ingress._deployment_config.max_surge_percent == 100
