"""What KubeRay 1.7's operator asks of a RayService beyond its CRD: rules found in its behaviour, as functions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from tests.k8s.manifests import Manifest

NAME_LIMIT = 47
_RESOURCE_PARAMS = {"num-cpus", "num-gpus", "memory", "resources"}
_UPGRADES = {None, "None", "NewCluster", "NewClusterWithIncrementalUpgrade"}
_DURATION = re.compile(r"(?:[0-9]+(?:\.[0-9]+)?(?:ns|us|ms|s|m|h))+|[1-9][0-9]*")


def complaints(service: Manifest) -> list[str]:
    """What the operator would refuse `service` for, or not work with."""
    cluster = service["spec"]["rayClusterConfig"]
    return [
        *_names(service),
        *(c for name, group in _groups(cluster) for c in _group(name, group)),
        *_head(cluster["headGroupSpec"]),
        *_autoscaler(cluster),
        *_fault_tolerance(cluster),
        *_authentication(cluster),
        *_upgrade(service["spec"]),
    ]


def _groups(cluster: Manifest) -> Iterator[tuple[str, Manifest]]:
    yield "head", cluster["headGroupSpec"]
    for group in cluster.get("workerGroupSpecs", ()):
        yield group["groupName"], group


def _names(service: Manifest) -> Iterator[str]:
    name = service["metadata"]["name"]
    if len(name) > NAME_LIMIT or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        yield f"name {name}: at most {NAME_LIMIT} of a-z, 0-9 and -, a letter first"
    timeout = service["metadata"].get("annotations", {}).get("ray.io/initializing-timeout", "1s")
    if not _DURATION.fullmatch(timeout):
        yield f"ray.io/initializing-timeout {timeout}: a duration such as 30m, or seconds"
    workers = [g["groupName"] for g in service["spec"]["rayClusterConfig"].get("workerGroupSpecs", ())]
    if len(set(workers)) < len(workers):
        yield f"two worker groups have one name: {workers}"


def _group(name: str, group: Manifest) -> Iterator[str]:
    containers = group["template"]["spec"]["containers"]
    if not containers or containers[0]["name"] != "ray":
        yield f"{name}: the Ray container must come first"
    params = group.get("rayStartParams", {})
    if group.get("resources") and params.keys() & _RESOURCE_PARAMS:
        yield f"{name}: `resources` beside {sorted(params.keys() & _RESOURCE_PARAMS)} of rayStartParams"
    if "labels" in params:
        yield f"{name}: labels belong beside rayStartParams"
    if group.get("suspend"):
        yield f"{name}: suspend is for RayJobs"
    if not group.get("minReplicas", 0) <= group.get("replicas", 0) <= group.get("maxReplicas", 2**31):
        yield f"{name}: replicas are not between minReplicas and maxReplicas"


def _head(head: Manifest) -> Iterator[str]:
    ports = {port.get("name") for port in head["template"]["spec"]["containers"][0].get("ports", ())}
    if "serve" not in ports:
        yield "head: no container port is named serve, so the Service has no port for requests"
    if head.get("headService", {}).get("metadata", {}).get("name"):
        yield "head: headService has a name"


def _autoscaler(cluster: Manifest) -> Iterator[str]:
    head_env = _environment(cluster["headGroupSpec"])
    options = cluster.get("autoscalerOptions", {})
    if not cluster.get("enableInTreeAutoscaling"):
        if head_env.get("RAY_enable_autoscaler_v2") in ("1", "true"):
            yield "head: RAY_enable_autoscaler_v2 without enableInTreeAutoscaling"
        return
    if "version" in options and "RAY_enable_autoscaler_v2" in head_env:
        yield "head: RAY_enable_autoscaler_v2 beside autoscalerOptions.version"
    if options.get("version") == "v2" or head_env.get("RAY_enable_autoscaler_v2") in ("1", "true"):
        for name, group in _groups(cluster):
            if group["template"]["spec"].get("restartPolicy", "Never") != "Never":
                yield f"{name}: autoscaler v2 wants restartPolicy Never"


def _fault_tolerance(cluster: Manifest) -> Iterator[str]:
    head, environment = cluster["headGroupSpec"], _environment(cluster["headGroupSpec"])
    params = head.get("rayStartParams", {})
    if "redis-username" in params or "REDIS_USERNAME" in environment:
        yield "head: the Redis user belongs to gcsFaultToleranceOptions"
    if "gcsFaultToleranceOptions" not in cluster:
        if "RAY_REDIS_ADDRESS" in environment:
            yield "head: RAY_REDIS_ADDRESS without gcsFaultToleranceOptions"
    elif "redis-password" in params or environment.keys() & {"REDIS_PASSWORD", "RAY_REDIS_ADDRESS"}:
        yield "head: Redis is named beside gcsFaultToleranceOptions"


def _authentication(cluster: Manifest) -> Iterator[str]:
    if cluster.get("authOptions", {}).get("mode") == "token":
        version = re.fullmatch(r"(\d+)\.(\d+)\.\d+", cluster.get("rayVersion", ""))
        if version is None or (int(version[1]), int(version[2])) < (2, 52):
            yield f"token authentication needs rayVersion 2.52 or later, not {cluster.get('rayVersion')!r}"


def _upgrade(spec: Manifest) -> Iterator[str]:
    if spec.get("rayClusterDeletionDelaySeconds", 0) < 0:
        yield "rayClusterDeletionDelaySeconds is negative"
    strategy: dict[str, Any] = spec.get("upgradeStrategy", {})
    if strategy.get("type") not in _UPGRADES:
        yield f"upgradeStrategy {strategy['type']} is not known"
    if strategy.get("type") != "NewClusterWithIncrementalUpgrade":
        return
    if not spec["rayClusterConfig"].get("enableInTreeAutoscaling"):
        yield "incremental upgrades need the autoscaler"
    options = strategy.get("clusterUpgradeOptions", {})
    if not options.get("gatewayClassName"):
        yield "incremental upgrades need a gatewayClassName"
    if not 0 <= options.get("stepSizePercent", -1) <= 100 or not 0 <= options.get("maxSurgePercent", 100) <= 100:
        yield "incremental upgrades: percentages are 0 to 100"
    if options.get("intervalSeconds", 0) <= 0:
        yield "incremental upgrades: intervalSeconds is positive"


def _environment(group: Manifest) -> dict[str, str]:
    container = group["template"]["spec"]["containers"][0]
    return {each["name"]: each.get("value", "") for each in container.get("env", ())}
