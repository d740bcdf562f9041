"""Every overlay builds, keeps to the schemas, the operator's rules and our own; each check finds a planted mistake."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _get_custom_resources
from ray.serve.schema import ServeDeploySchema

from deployments.config_file import read_config
from tests.k8s import house_rules, operator_rules, schemas
from tests.k8s.manifests import (
    K8S,
    OVERLAYS,
    Manifest,
    build,
    build_text,
    crd_schema,
    groups,
    of_kind,
    planted,
    ray_service,
    serve_config,
)

CONFIGS = sorted(p.relative_to(K8S).as_posix() for p in K8S.rglob("serve_config.yaml"))
WANTED = {"autoscaling", "cpu-demo", "ha", "heterogeneous", "ingress", "multi-gpu/2", "multi-gpu/4", "single-gpu"}

every_overlay = pytest.mark.parametrize("folder", ["base", *OVERLAYS])


def cluster(manifests: list[Manifest]) -> Manifest:
    found: Manifest = ray_service(manifests)["spec"]["rayClusterConfig"]
    return found


def worker(manifests: list[Manifest]) -> Manifest:
    return groups(ray_service(manifests))[0]


def container(manifests: list[Manifest]) -> Manifest:
    found: Manifest = worker(manifests)["template"]["spec"]["containers"][0]
    return found


def test_all_overlays_are_there() -> None:
    assert {o.removeprefix("overlays/") for o in OVERLAYS} >= WANTED


@every_overlay
def test_core_kinds_keep_to_kubernetes_schemas(folder: str) -> None:
    for manifest in build(K8S / folder):
        if manifest["kind"] in schemas.OTHERS:
            assert schemas.other_complaints(manifest) == []
        elif manifest["kind"] != "RayService":
            assert schemas.core_complaint(manifest) is None, manifest["metadata"]["name"]


@every_overlay
def test_the_ray_service_keeps_to_its_strict_schema(folder: str) -> None:
    assert schemas.crd_complaints(ray_service(build(K8S / folder)), crd_schema()) == []


@every_overlay
def test_the_operator_takes_it(folder: str) -> None:
    assert operator_rules.complaints(ray_service(build(K8S / folder))) == []


@every_overlay
def test_house_rules(folder: str) -> None:
    assert house_rules.complaints(build(K8S / folder)) == []


@every_overlay
def test_the_built_serve_config_is_the_file(folder: str) -> None:
    """What kustomize put into the RayService is some serve_config.yaml of k8s/, to the letter."""
    text = ray_service(build(K8S / folder))["spec"]["serveConfigV2"]
    assert text in {(K8S / path).read_text(encoding="utf-8") for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS)
def test_serve_configs_are_rays_ours_and_importable(path: str) -> None:
    file = read_config(K8S / path)
    config = ServeDeploySchema.model_validate(file.config.model_dump(mode="json", exclude_unset=True))
    for application in config.applications:
        module, _, name = application.import_path.partition(":")
        assert callable(getattr(importlib.import_module(module), name))


def test_the_autoscaler_reads_the_workers_resources() -> None:
    service = ray_service(build(K8S / "overlays/heterogeneous"))
    asked = [
        resource
        for model in serve_config(service)["applications"][0]["args"]["models"]
        for pool in model["pools"]
        for resource in pool["resources"]
    ]
    found = [_get_custom_resources({}, g["rayStartParams"], g["groupName"]) for g in groups(service)]
    assert found == [{resource: 1} for resource in asked]


def test_the_way_in_waits_as_long_as_a_request_may_take() -> None:
    manifests = build(K8S / "overlays/ingress")
    (route,) = of_kind(manifests, "HTTPRoute")
    limit = 600
    for rule in route["spec"]["rules"]:
        assert {int(t.removesuffix("s")) > limit for t in rule["timeouts"].values()} == {True}
    text = (K8S / "components/nginx/ingress.yaml").read_text(encoding="utf-8")
    assert 'proxy-buffering: "off"' in text
    assert 'proxy-read-timeout: "660"' in text


@every_overlay
def test_prometheus_reads_one_address_and_shows_a_key_where_one_is_asked(folder: str) -> None:
    manifests = build(K8S / folder)
    if folder == "overlays/cpu-demo":
        assert not [m for m in manifests if m["apiVersion"].startswith("monitoring")]
        return
    monitors = {m["metadata"]["name"]: m["spec"] for m in of_kind(manifests, "PodMonitor")}
    (page,) = monitors["headroom"]["podMetricsEndpoints"]
    assert monitors["headroom"]["selector"]["matchLabels"]["app.kubernetes.io/component"] == "head"
    assert (page["port"], page["path"]) == ("serve", "/metrics")
    keyed = "api_keys_file" in serve_config(ray_service(manifests))["applications"][0]["args"].get("api", {})
    assert keyed == ("authorization" in page)
    (dashboard,) = [m for m in of_kind(manifests, "ConfigMap") if m["metadata"]["name"] == "headroom-dashboard"]
    assert dashboard["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(dashboard["data"]["dashboard.json"])["panels"]


CRD_MISTAKES: dict[str, Callable[[list[Manifest]], Any]] = {
    "a typo": lambda m: cluster(m).update(rayVersoin="2.60.0"),
    "a typo deep in a pod": lambda m: container(m).update(volumeMount=[]),
    "a wrong type": lambda m: worker(m).update(replicas="two"),
    "a missing name": lambda m: worker(m).pop("groupName"),
}


@pytest.mark.parametrize("name", CRD_MISTAKES)
def test_the_strict_schema_finds(name: str) -> None:
    broken = planted(build(K8S / "overlays/ha"), CRD_MISTAKES[name])
    assert schemas.crd_complaints(ray_service(broken), crd_schema())


def test_the_core_and_other_schemas_find_typos() -> None:
    manifests = build(K8S / "overlays/ingress")
    (budget,) = of_kind(manifests, "PodDisruptionBudget")
    assert schemas.core_complaint({**budget, "spec": {**budget["spec"], "minAvailabel": 1}})
    (route,) = of_kind(manifests, "HTTPRoute")
    assert schemas.other_complaints({**route, "spec": {**route["spec"], "hostname": "x"}})


def scaling(m: list[Manifest], **options: Any) -> None:
    cluster(m)["autoscalerOptions"].update(options)


OPERATOR_MISTAKES: dict[str, tuple[Callable[[list[Manifest]], Any], str]] = {
    "long name": (lambda m: ray_service(m)["metadata"].update(name="h" * 48), "at most 47"),
    "no serve port": (
        lambda m: cluster(m)["headGroupSpec"]["template"]["spec"]["containers"][0].update(ports=[]),
        "named serve",
    ),
    "sidecar first": (
        lambda m: worker(m)["template"]["spec"]["containers"].insert(0, {"name": "sidecar", "image": "x:1"}),
        "must come first",
    ),
    "resources twice": (lambda m: worker(m).update(resources={"CPU": "4"}), "beside"),
    "restart": (lambda m: worker(m)["template"]["spec"].update(restartPolicy="Always"), "restartPolicy Never"),
    "no autoscaler": (lambda m: cluster(m).pop("enableInTreeAutoscaling"), "need the autoscaler"),
    "old Ray": (lambda m: cluster(m).update(rayVersion="2.51.0"), "2.52"),
    "redis twice": (
        lambda m: cluster(m)["headGroupSpec"]["template"]["spec"]["containers"][0]["env"].append(
            {"name": "RAY_REDIS_ADDRESS", "value": "x"}
        ),
        "beside gcsFaultToleranceOptions",
    ),
    "strategy": (lambda m: ray_service(m)["spec"]["upgradeStrategy"].update(type="Rolling"), "not known"),
    "too many": (lambda m: worker(m).update(replicas=9), "between"),
    "step": (
        lambda m: ray_service(m)["spec"]["upgradeStrategy"]["clusterUpgradeOptions"].update(stepSizePercent=120),
        "percentages",
    ),
}


@pytest.mark.parametrize("name", OPERATOR_MISTAKES)
def test_the_operators_rules_find(name: str) -> None:
    mistake, said = OPERATOR_MISTAKES[name]
    broken = planted(build(K8S / "overlays/ha"), mistake)
    assert any(said in c for c in operator_rules.complaints(ray_service(broken)))


def replaced(m: list[Manifest], old: str, new: str) -> None:
    spec = ray_service(m)["spec"]
    spec["serveConfigV2"] = spec["serveConfigV2"].replace(old, new)


def policy(m: list[Manifest], name: str) -> Manifest:
    found: Manifest = next(p["spec"] for p in of_kind(m, "NetworkPolicy") if p["metadata"]["name"] == name)
    return found


HOUSE_MISTAKES: dict[str, tuple[Callable[[list[Manifest]], Any], str]] = {
    "root": (lambda m: worker(m)["template"]["spec"]["securityContext"].pop("runAsNonRoot"), "may run as root"),
    "writable": (lambda m: container(m)["securityContext"].update(readOnlyRootFilesystem=False), "may write"),
    "capable": (lambda m: container(m)["securityContext"].pop("capabilities"), "keeps capabilities"),
    "latest": (lambda m: container(m).update(image="headroom:latest"), "no tag that stays"),
    "account": (lambda m: worker(m)["template"]["spec"].update(serviceAccountName="x"), "no ServiceAccount x"),
    "claim": (lambda m: m.remove(of_kind(m, "PersistentVolumeClaim")[0]), "no PersistentVolumeClaim"),
    "no shm": (lambda m: container(m)["volumeMounts"].pop(2), "/dev/shm"),
    "no drain": (lambda m: container(m).pop("lifecycle"), "does not drain"),
    "grace": (lambda m: worker(m)["template"]["spec"].update(terminationGracePeriodSeconds=610), "exceed the drain"),
    "slow replica": (lambda m: replaced(m, "stages: 2", "stages: 2\n        drain_s: 900"), "may take 900 s"),
    "liveness": (
        lambda m: container(m)["livenessProbe"].update(httpGet={"path": "/ready", "port": 8000}),
        "would end a worker",
    ),
    "readiness": (lambda m: container(m)["readinessProbe"].update(failureThreshold=6), "30 s or more"),
    "deletion": (lambda m: ray_service(m)["spec"].update(rayClusterDeletionDelaySeconds=60), "is deleted before"),
    "auto": (lambda m: replaced(m, "device: cuda", "device: auto"), "device auto"),
    "stages": (lambda m: replaced(m, "stages: 2", "stages: 3"), "3 stages"),
    "resource": (lambda m: replaced(m, "int8-2xl4: 1", "int8-2xl5: 1"), "no worker group has"),
    "replicas": (lambda m: replaced(m, "replicas: 1", "replicas: 2"), "fewer workers"),
    "selector": (
        lambda m: of_kind(m, "NetworkPolicy")[0]["spec"]["podSelector"]["matchLabels"].update(x="y"),
        "selects no pod",
    ),
    "budget": (lambda m: of_kind(m, "PodDisruptionBudget")[0]["spec"].update(minAvailable="50%"), "whole minAvailable"),
    "keys": (lambda m: replaced(m, "/etc/headroom/keys.yaml", "/etc/keys/keys.yaml"), "mounts no Secret at /etc/keys"),
    "writable keys": (lambda m: container(m)["volumeMounts"][3].pop("readOnly"), "keys may be written"),
    "fixed keys": (lambda m: container(m)["volumeMounts"][3].update(subPath="keys.yaml"), "never be updated"),
    "no names": (lambda m: policy(m, "headroom")["egress"].pop(1), "egress is closed to [53]"),
    "no operator": (lambda m: policy(m, "headroom")["ingress"].pop(1), "ingress is closed to [8265, 52365]"),
    "open to all": (lambda m: policy(m, "headroom-clients")["ingress"][0].pop("from"), "open to everyone"),
    "metadata": (lambda m: policy(m, "headroom")["egress"][2]["to"][0]["ipBlock"].pop("except"), "metadata"),
    "host": (lambda m: replaced(m, "0.0.0.0", "127.0.0.1"), "does not listen"),
}


@pytest.mark.parametrize("name", HOUSE_MISTAKES)
def test_the_house_rules_find(name: str) -> None:
    mistake, said = HOUSE_MISTAKES[name]
    broken = planted(build(K8S / "overlays/multi-gpu/2"), mistake)
    found = house_rules.complaints(broken)
    assert any(said in c for c in found), found


SCALING_MISTAKES: dict[str, tuple[Callable[[list[Manifest]], Any], str]] = {
    "front anywhere": (lambda m: replaced(m, "resources:\n        headroom-front: 0.001", "replicas: 1"), "keep a GPU"),
    "front goes": (lambda m: worker(m).update(minReplicas=0), "no worker that stays"),
    "most": (lambda m: replaced(m, "max_replicas: 2", "max_replicas: 3"), "fewer workers"),
}


@pytest.mark.parametrize("name", SCALING_MISTAKES)
def test_the_house_rules_find_of_pools_that_scale(name: str) -> None:
    mistake, said = SCALING_MISTAKES[name]
    found = house_rules.complaints(planted(build(K8S / "overlays/autoscaling"), mistake))
    assert any(said in c for c in found), found


def on_top(folder: Path, overlay: str, *components: str) -> list[Manifest]:
    """An overlay with components, as docs/operations.md has it."""
    k8s = os.path.relpath(K8S, folder)
    added = ", ".join(f"{k8s}/components/{name}" for name in components)
    text = f"namespace: headroom\nresources: [{k8s}/overlays/{overlay}]\ncomponents: [{added}]\n"
    (folder / "kustomization.yaml").write_text(text, encoding="utf-8")
    return build(folder)


@pytest.mark.parametrize(
    ("components", "kinds"),
    [
        (("nginx",), {"Ingress"}),
        (("gateway", "prefetch"), {"Gateway", "HTTPRoute", "Job"}),
        (("autoscaling", "ha"), {"Service", "StatefulSet"}),
        (("private-registry",), set[str]()),
    ],
    ids=lambda value: "-".join(sorted(value)),
)
def test_components_go_on_top_of_an_overlay(components: tuple[str, ...], kinds: set[str], tmp_path: Path) -> None:
    manifests = on_top(tmp_path, "multi-gpu/4", *components)
    there = {m["kind"] for m in build(K8S / "overlays/multi-gpu/4")}
    assert {m["kind"] for m in manifests} - there == kinds
    assert {m["metadata"].get("namespace", "headroom") for m in manifests} == {"headroom"}
    assert house_rules.complaints(manifests) == []
    assert operator_rules.complaints(ray_service(manifests)) == []
    for manifest in manifests:
        if manifest["kind"] in schemas.OTHERS:
            assert schemas.other_complaints(manifest) == []
        elif manifest["kind"] != "RayService":
            assert schemas.core_complaint(manifest) is None, manifest["metadata"]["name"]
    (account,) = of_kind(manifests, "ServiceAccount")
    assert account.get("imagePullSecrets", []) == ([{"name": "registry"}] if "private-registry" in components else [])


def test_both_ways_in_lead_to_the_same_paths() -> None:
    _, route = yaml.safe_load_all((K8S / "components/gateway/gateway.yaml").read_text(encoding="utf-8"))
    ingress = yaml.safe_load((K8S / "components/nginx/ingress.yaml").read_text(encoding="utf-8"))
    by_gateway = {match["path"]["value"] for match in route["spec"]["rules"][0]["matches"]}
    by_nginx = {path["path"] for path in ingress["spec"]["rules"][0]["http"]["paths"]}
    assert by_gateway == by_nginx == {"/v1", "/ready"}


@pytest.mark.parametrize("overlay", ["single-gpu", "heterogeneous"])
def test_models_are_fetched_beforehand_where_there_is_a_shared_cache(overlay: str, tmp_path: Path) -> None:
    if overlay == "heterogeneous":  # each worker has a cache of its own
        with pytest.raises(ValueError, match="nothing selected by PersistentVolumeClaim"):
            on_top(tmp_path, overlay, "prefetch")
    else:
        assert house_rules.complaints(on_top(tmp_path, overlay, "prefetch")) == []


def test_a_kustomization_that_does_not_build_is_said(tmp_path: Any) -> None:
    (tmp_path / "kustomization.yaml").write_text("resources: [nothing.yaml]\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"nothing\.yaml"):
        build_text(tmp_path)
