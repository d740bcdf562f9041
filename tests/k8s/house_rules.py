"""What k8s/ promises beyond schemas: pod security, drains, probes, and that what refers to something finds it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from deployments.settings import Settings
from tests.k8s.manifests import Manifest, groups, of_kind, pod_templates, ray_service, serve_config

PORTS = {"ingress": {8000, 8080, 8265, 52365}, "egress": {53, 443}}
"""Requests and both pages of metrics, the operator; names and the hub."""
METADATA = "169.254.0.0/16"
"""Where clouds give a machine's credentials to whoever asks."""
LOAD_BALANCER_S = 30
"""How long Serve's ingress replicas go on answering while load balancers forget them (Ray 2.60's default)."""


def complaints(manifests: list[Manifest]) -> list[str]:
    """Which promises `manifests` break."""
    service = ray_service(manifests)
    settings = Settings.model_validate(serve_config(service)["applications"][0]["args"])
    found = [c for name, template in pod_templates(manifests) for c in _restricted(name, template["spec"])]
    found += [c for name, template in pod_templates(manifests) for c in _refers(name, template["spec"], manifests)]
    for group in groups(service):
        found += _worker(group, settings)
        found += _keys(group, settings)
    return [
        *found,
        *_cluster(service, settings),
        *_pools(service, settings),
        *_fronts(service, settings),
        *_selectors(manifests),
        *_budget(manifests),
        *_network(manifests),
    ]


def _restricted(name: str, pod: Manifest) -> Iterator[str]:
    """Pod security "restricted", and a root file system that can't be written to."""
    security = pod.get("securityContext", {})
    if security.get("runAsNonRoot") is not True or not security.get("runAsUser"):
        yield f"{name}: may run as root"
    if security.get("seccompProfile") != {"type": "RuntimeDefault"}:
        yield f"{name}: no seccomp profile"
    for container in (*pod.get("initContainers", ()), *pod["containers"]):
        own, where = container.get("securityContext", {}), f"{name}/{container['name']}"
        if own.get("allowPrivilegeEscalation") is not False:
            yield f"{where}: may gain privileges"
        if own.get("capabilities") != {"drop": ["ALL"]}:
            yield f"{where}: keeps capabilities"
        if own.get("readOnlyRootFilesystem") is not True:
            yield f"{where}: may write to its root file system"
        if "limits" not in container.get("resources", {}) or "requests" not in container.get("resources", {}):
            yield f"{where}: no requests and limits"
        if container["image"].rpartition(":")[2] in ("", "latest") or ":" not in container["image"]:
            yield f"{where}: image {container['image']} has no tag that stays"


def _refers(name: str, pod: Manifest, manifests: list[Manifest]) -> Iterator[str]:
    """Accounts, claims, ConfigMaps and volumes that a pod names are there."""
    there = {(m["kind"], m["metadata"]["name"]) for m in manifests}
    if ("ServiceAccount", pod.get("serviceAccountName")) not in there:
        yield f"{name}: there is no ServiceAccount {pod.get('serviceAccountName')}"
    for volume in pod.get("volumes", ()):
        claim = volume.get("persistentVolumeClaim", {}).get("claimName")
        if claim and ("PersistentVolumeClaim", claim) not in there:
            yield f"{name}: there is no PersistentVolumeClaim {claim}"
        config = volume.get("configMap", {}).get("name")
        if config and ("ConfigMap", config) not in there:
            yield f"{name}: there is no ConfigMap {config}"
    volumes = {volume["name"] for volume in pod.get("volumes", ())}
    for container in pod["containers"]:
        mounts = {mount["name"]: mount["mountPath"] for mount in container.get("volumeMounts", ())}
        if container["name"] == "ray":
            if mounts.keys() - volumes:
                yield f"{name}: mounts {sorted(mounts.keys() - volumes)}, which are no volumes"
            if missing := {"/tmp", "/dev/shm"} - set(mounts.values()):
                yield f"{name}: Ray needs to write to {sorted(missing)}"


def _worker(group: Manifest, settings: Settings) -> Iterator[str]:
    """Ends after its drain; lives without a replica; leaves the Service before its ingress does."""
    name, pod = group["groupName"], group["template"]["spec"]
    ray = pod["containers"][0]
    hook = ray.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
    if hook[:4] != ["python", "-m", "deployments.drain", "--deadline"]:
        yield f"{name}: does not drain before it ends"
        return
    longest = max(pool.drain_s for model in settings.models for pool in model.pools)
    if int(hook[4]) < longest:
        yield f"{name}: {hook[4]} s to drain, and a replica may take {longest:g} s"
    if pod.get("terminationGracePeriodSeconds", 30) < int(hook[4]) + 30:
        yield f"{name}: terminationGracePeriodSeconds must exceed the drain's {hook[4]} s by 30"
    for probe in ("startupProbe", "livenessProbe"):
        if ray[probe]["httpGet"] != {"path": "/api/healthz", "port": 52365}:
            yield f"{name}: {probe} asks for more than Ray's node, and would end a worker that loads or has no replica"
    ready = ray["readinessProbe"]
    if ready["httpGet"] != {"path": "/-/healthz", "port": 8000}:
        yield f"{name}: readiness does not ask Serve's proxy"
    if ready["periodSeconds"] * ready["failureThreshold"] >= LOAD_BALANCER_S:
        yield f"{name}: readiness takes {LOAD_BALANCER_S} s or more to notice that the proxy drains"


def _keys(group: Manifest, settings: Settings) -> Iterator[str]:
    """The key file is a Secret's, read-only, and follows it."""
    if settings.api.api_keys_file is None:
        return
    name, pod = group["groupName"], group["template"]["spec"]
    path = PurePosixPath(settings.api.api_keys_file)
    secrets = {v["name"]: {item["path"] for item in v["secret"]["items"]} for v in pod["volumes"] if "secret" in v}
    mounts = [
        mount
        for mount in pod["containers"][0]["volumeMounts"]
        if path.name in secrets.get(mount["name"], ()) and PurePosixPath(mount["mountPath"]) == path.parent
    ]
    if not mounts:
        yield f"{name}: mounts no Secret at {path.parent} with {path.name}, which api.api_keys_file names"
    for mount in mounts:
        if mount.get("readOnly") is not True:
            yield f"{name}: its keys may be written"
        if "subPath" in mount:
            yield f"{name}: its keys will never be updated: Kubernetes does not follow a Secret below a subPath"


def _cluster(service: Manifest, settings: Settings) -> Iterator[str]:
    spec = service["spec"]
    if spec.get("rayClusterDeletionDelaySeconds", 60) < settings.api.request_timeout_s:
        yield f"the old cluster is deleted before a request of {settings.api.request_timeout_s:g} s has ended"
    if spec["rayClusterConfig"]["headGroupSpec"]["rayStartParams"].get("num-cpus") != "0":
        yield "head: replicas may land on it"
    if spec["rayClusterConfig"].get("authOptions") != {"mode": "token"}:
        yield "Ray's token authentication is off"
    images = {t["spec"]["containers"][0]["image"] for _, t in pod_templates([service])}
    if len(images) > 1:
        yield f"head and workers have different images: {sorted(images)}"
    config = serve_config(service)
    if config.get("http_options") != {"host": "0.0.0.0", "port": 8000}:
        yield "Serve does not listen on the pod's address, port 8000"


def _pools(service: Manifest, settings: Settings) -> Iterator[str]:
    """Every replica finds a worker: its custom resource, its GPUs, and as many pods as replicas."""
    for model in settings.models:
        for pool in model.pools:
            where = f"{model.name}/{pool.name}"
            if pool.device == "auto":
                yield f"{where}: device auto depends on which workers are there when the application is built"
            if pool.device != "cuda":
                continue
            able = [g for g in groups(service) if pool.resources.keys() <= _resources(g).keys() and pool.resources]
            if not able:
                yield f"{where}: no worker group has {sorted(pool.resources)}"
            elif sum(g["maxReplicas"] for g in able) < pool.most_replicas:
                yield f"{where}: {pool.most_replicas} replicas, and fewer workers"
            for group in able:
                limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
                if int(limits.get("nvidia.com/gpu", 0)) != pool.stage_count:
                    yield f"{where}: {pool.stage_count} stages, and a worker has {limits.get('nvidia.com/gpu')} GPUs"


def _fronts(service: Manifest, settings: Settings) -> Iterator[str]:
    """Where GPU workers may all go, ingress and ledgers have another one that stays."""
    asked = settings.api.resources
    staying = [g for g in groups(service) if asked.keys() <= _resources(g).keys() and g["minReplicas"] > 0]
    if asked and not staying:
        yield f"ingress and ledgers ask for {sorted(asked)}, and no worker that stays has it"
    if not asked and any(p.device == "cuda" and p.fewest_replicas == 0 for m in settings.models for p in m.pools):
        yield "ingress and ledgers keep a GPU worker that no replica needs: api.resources must name another one"


def _resources(group: Manifest) -> dict[str, Any]:
    text = group["rayStartParams"].get("resources", '"{}"')
    found: dict[str, Any] = json.loads(text[1:-1].replace("\\", ""))
    return found


def _selectors(manifests: list[Manifest]) -> Iterator[str]:
    """Every selector finds pods."""
    labels = [template["metadata"]["labels"] for _, template in pod_templates(manifests)]
    for manifest in manifests:
        spec = manifest.get("spec", {})
        selector = spec.get("podSelector" if manifest["kind"] == "NetworkPolicy" else "selector", {}).get("matchLabels")
        if selector and not any(selector.items() <= each.items() for each in labels):
            yield f"{manifest['kind']} {manifest['metadata']['name']}: selects no pod"


def _budget(manifests: list[Manifest]) -> Iterator[str]:
    for budget in of_kind(manifests, "PodDisruptionBudget"):
        spec = budget["spec"]
        if "maxUnavailable" in spec or not isinstance(spec.get("minAvailable"), int):
            yield "the disruption budget needs a whole minAvailable: the pods' owner has no scale"
        if spec.get("unhealthyPodEvictionPolicy") != "AlwaysAllow":
            yield "a worker without a replica keeps its node from being drained"


def _network(manifests: list[Manifest]) -> Iterator[str]:
    """Open is what is needed, and no more."""
    policies = [policy["spec"] for policy in of_kind(manifests, "NetworkPolicy")]
    for direction, needed in PORTS.items():
        rules = [rule for policy in policies for rule in policy.get(direction, ())]
        if missing := needed - {port["port"] for rule in rules for port in rule.get("ports", ())}:
            yield f"network: {direction} is closed to {sorted(missing)}"
        if direction == "ingress" and not all(rule.get("from") for rule in rules):
            yield "network: ingress is open to everyone"
        blocks = [peer.get("ipBlock", {}) for rule in rules for peer in rule.get("to", ())]
        if any(b.get("cidr") == "0.0.0.0/0" and METADATA not in b.get("except", ()) for b in blocks):
            yield f"network: {direction} is open to the cloud's metadata, {METADATA}"
