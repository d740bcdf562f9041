"""A cluster plan as a kustomize overlay: one worker group per pool, one pod per replica.

A pod holds the GPUs of exactly one replica: Kubernetes decides on which node it runs, and Ray sees one node each. A
pool finds its group by a custom Ray resource that only the group's pods have.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import yaml

from deployments.api.templates import is_template
from deployments.errors import ConfigError
from deployments.store import DEMO, HUB_ID
from placement.cards import find_card
from placement.cluster import Layout, Pool
from placement.cluster_export import pool_names, serve_args
from placement.hardware import Gpu, Inventory

PORT = 8000
"""Of Serve's proxy in every pod; k8s/base names it too."""
KEYS_FILE = "/etc/headroom/keys.yaml"
"""Where k8s/base mounts the Secret's hashes of API keys."""
MODELS = "/models"
"""Where k8s/base mounts the model cache in every worker."""
CACHE_CLAIM = "model-cache"
"""The base's PersistentVolumeClaim, shared by all workers."""
PRODUCT_LABEL = "nvidia.com/gpu.product"
"""What NVIDIA's GPU feature discovery puts on a node: the product's name with dashes."""

FRONT = "headroom-front"
"""The custom Ray resource of the worker that ingress and ledgers share where other workers come and go."""
FRONT_SHARE = 0.001
"""What each of them asks of it."""
COLD_WAIT_S = 540.0
"""How long a request waits where its replica may first need a worker, under `api.request_timeout_s`."""

GroupSpec = dict[str, Any]
"""An element of `spec.rayClusterConfig.workerGroupSpecs`."""

_PRODUCTS = {
    "B200": ("NVIDIA-B200",),
    "GH200": ("NVIDIA-GH200-480GB", "NVIDIA-GH200-96GB-HBM3"),
    "H200": ("NVIDIA-H200",),
    "H200 NVL": ("NVIDIA-H200-NVL",),
    "H100": ("NVIDIA-H100-80GB-HBM3",),
    "H100 PCIe": ("NVIDIA-H100-PCIe",),
    "H100 NVL": ("NVIDIA-H100-NVL",),
    "A100 40GB": ("NVIDIA-A100-SXM4-40GB", "NVIDIA-A100-PCIE-40GB"),
    "A100 80GB": ("NVIDIA-A100-SXM4-80GB",),
    "A100 80GB PCIe": ("NVIDIA-A100-80GB-PCIe",),
    "A40": ("NVIDIA-A40",),
    "A30": ("NVIDIA-A30",),
    "A10G": ("NVIDIA-A10G",),
    "A10": ("NVIDIA-A10",),
    "L40S": ("NVIDIA-L40S",),
    "L40": ("NVIDIA-L40",),
    "L4": ("NVIDIA-L4",),
    "T4": ("Tesla-T4",),
    "V100 16GB": ("Tesla-V100-SXM2-16GB", "Tesla-V100-PCIE-16GB"),
    "V100 32GB": ("Tesla-V100-SXM2-32GB", "Tesla-V100-PCIE-32GB"),
    "RTX 6000 Ada": ("NVIDIA-RTX-6000-Ada-Generation",),
    "RTX A6000": ("NVIDIA-RTX-A6000",),
    "RTX 5090": ("NVIDIA-GeForce-RTX-5090",),
    "RTX 4090": ("NVIDIA-GeForce-RTX-4090",),
    "RTX 3090": ("NVIDIA-GeForce-RTX-3090",),
}

_METRICS_KEY = [
    {
        "op": "add",
        "path": "/spec/podMetricsEndpoints/0/authorization",
        "value": {"type": "Bearer", "credentials": {"name": "headroom", "key": "metrics-key"}},
    }
]
"""With API keys on, Prometheus shows one too, whose hash has the role admin in the key file."""


@dataclass(frozen=True, slots=True)
class Worker:
    """What every worker pod is like, its GPUs apart."""

    cpus: int
    memory: str
    """As Kubernetes writes it: 24Gi."""
    image: str
    """With its tag."""
    own_cache: str | None = None
    """Size of a model cache of the pod's own; None: all share the base's."""
    node_labels: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """By a GPU's name, the label and value of nodes that have it, instead of GPU feature discovery's."""


@dataclass(frozen=True, slots=True)
class Overlay:
    """The files of an overlay, beside the base that it changes."""

    serve_config: str
    workers: str
    """A JSON 6902 patch: a strategic merge would drop what it doesn't repeat of a worker group."""
    kustomization: str

    def files(self) -> dict[str, str]:
        """Text by file name."""
        return {
            "kustomization.yaml": self.kustomization,
            "serve_config.yaml": self.serve_config,
            "workers.yaml": self.workers,
        }


def overlay(
    inventory: Inventory,
    layout: Layout,
    template: GroupSpec,
    *,
    worker: Worker,
    base: str,
    header: str,
    min_replicas: int | None = None,
) -> Overlay:
    """The overlay of a plan.

    Args:
        template: the base's worker group, which every group is a copy of.
        base: path from the overlay to the base.
        header: comment lines for each file, without the `#`.
        min_replicas: of each pool, which then follows demand up to as many as planned; None: always as many as planned.

    Raises:
        ConfigError: Kubernetes can't be asked for a pool's GPUs, `min_replicas` is more than a pool has, or workers
            don't have what a model is to be loaded from.
    """
    for pool in layout.pools:
        _check_source(pool.wish.name, pool.wish.source, shared=worker.own_cache is None)
    comment = "".join(f"# {line}\n" for line in header.splitlines())
    args = _args(inventory, layout)
    groups = [
        _group(template, pool, name, _resource(args, pool, name), worker)
        for pool, name in zip(layout.pools, pool_names(layout), strict=True)
    ]
    if min_replicas is not None:
        args = _following_demand(args, min_replicas)
        groups = [_front(template, worker), *(group | {"replicas": min_replicas} for group in groups)]
    patch = [{"op": "replace", "path": "/spec/rayClusterConfig/workerGroupSpecs", "value": groups}]
    return Overlay(
        serve_config=comment + dump(_config(args)),
        workers=comment + dump(patch),
        kustomization=comment + dump(_kustomization(base, worker, autoscaling=min_replicas is not None)),
    )


def cluster_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A `serve_config.yaml` of one machine as the base's CPU workers run it.

    Serve listens on the pod's address. A pool's `device` is said outright: `auto` asks Ray what the cluster has while
    the application is built, and the workers may come later. API keys are read from where the Secret is mounted.

    Raises:
        ConfigError: it asks for what the base's workers don't have.
    """
    found = copy.deepcopy(dict(config))
    (application,) = found["applications"]
    args = application["args"]
    api = args.get("api", {})
    if "api_keys_file" in api:
        api["api_keys_file"] = KEYS_FILE
    _refuse(api, "api", "api_keys_env", "no such variable: keys come from the Secret; use `api_keys_file`")
    _refuse(api, "api", "resources", "no custom resources")
    for model in args["models"]:
        _check_source(model["name"], model["source"], shared=True)
        _check_template(model["name"], model.get("chat_template"))
        for pool in model.setdefault("pools", [{}]):
            where = f"model {model['name']}: pool {pool.get('name', 'default')}"
            _refuse(pool, where, "resources", "no custom resources")
            if pool.get("device", "auto") == "cuda" or pool.get("accelerator_type"):
                raise ConfigError(
                    f"{where} is for GPUs, and the base's workers have none; write an overlay with --gpus"
                )
            pool["device"] = "cpu"
    http = {**found.get("http_options", {}), "host": "0.0.0.0", "port": PORT}
    return {**found, "http_options": http, "applications": [{**_config(args)["applications"][0], **application}]}


def _refuse(given: Mapping[str, Any], where: str, key: str, there: str) -> None:
    if given.get(key):
        raise ConfigError(f"{where} has {key}, and the base's workers have {there}; remove it")


def _check_source(model: str, source: str, *, shared: bool) -> None:
    """Workers have the hub, the image's embedded model, and the cache if it is shared: nothing of this machine."""
    if source == DEMO or (_in_cache(source) and shared):
        return
    if _in_cache(source):
        raise ConfigError(
            f"model {model}: source {source!r} is in the shared model cache, and with --own-cache each worker has an "
            "empty one: name a Hugging Face id, or leave --own-cache out"
        )
    if source.lower().endswith(".gguf") or not HUB_ID.fullmatch(source):
        raise ConfigError(
            f"model {model}: source {source!r} is a folder or file of this machine, which workers don't have: name a "
            f"Hugging Face id (beside --gpus with --source), or copy it into the model cache and name it below {MODELS}"
        )


def _check_template(model: str, template: str | None) -> None:
    if template is not None and not is_template(template) and not _in_cache(template):
        raise ConfigError(
            f"model {model}: chat_template {template!r} is a file of this machine, which workers don't have: write the "
            f"template itself, or copy it into the model cache and name it there, below {MODELS}"
        )


def _in_cache(path: str) -> bool:
    return PurePosixPath(path).is_relative_to(MODELS)


def dump(value: object) -> str:
    """YAML in the order given, every value written out."""
    text: str = yaml.dump(value, Dumper=_Plain, sort_keys=False, width=120)
    return text


class _Plain(yaml.SafeDumper):  # type: ignore[misc]  # PyYAML has no types
    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002  the signature is PyYAML's
        return True


def _config(args: Mapping[str, Any]) -> dict[str, Any]:
    application = {
        "name": "headroom",
        "route_prefix": "/",
        "import_path": "deployments.app:build",
        "args": dict(args),
    }
    return {"http_options": {"host": "0.0.0.0", "port": PORT}, "applications": [application]}


def _args(inventory: Inventory, layout: Layout) -> dict[str, Any]:
    """The application's `args`. The custom resource pins a pool; that its nodes have the kind of GPU, labels see to."""
    args = serve_args(inventory, layout, pin_nodes=True)
    for model in args["models"]:
        for pool in model["pools"]:
            pool.pop("accelerator_type", None)
    return {**args, "api": {"api_keys_file": KEYS_FILE}}


def _following_demand(args: Mapping[str, Any], min_replicas: int) -> dict[str, Any]:
    """The application's `args` with pools that scale, and ingress and ledgers on a worker of their own."""
    models = []
    for model in args["models"]:
        pools = []
        for pool in model["pools"]:
            most = pool["replicas"]
            if min_replicas > most:
                raise ConfigError(f"--min-replicas {min_replicas}: pool {pool['name']} is planned with {most}")
            scaling = {"autoscaling": {"min_replicas": min_replicas, "max_replicas": most}}
            rest = {key: value for key, value in pool.items() if key not in ("name", "replicas")}
            pools.append({"name": pool["name"], **scaling, **rest})
        wait = {} if min_replicas else {"wait_limit_s": COLD_WAIT_S}
        models.append({**model, **wait, "pools": pools})
    return {**args, "models": models, "api": {**args["api"], "resources": {FRONT: FRONT_SHARE}}}


def _front(template: GroupSpec, worker: Worker) -> GroupSpec:
    """One worker without GPUs that is always there."""
    group = _copied(template, worker)
    group |= {"groupName": "front", "replicas": 1, "minReplicas": 1, "maxReplicas": 1}
    group["rayStartParams"] = {**group["rayStartParams"], "resources": _start_param({FRONT: 1})}
    return group


def _resource(args: Mapping[str, Any], pool: Pool, name: str) -> str:
    model = next(m for m in args["models"] if m["name"] == pool.wish.name)
    (resource,) = next(p["resources"] for p in model["pools"] if p["name"] == name)
    return str(resource)


def _group(template: GroupSpec, pool: Pool, name: str, resource: str, worker: Worker) -> GroupSpec:
    group = _copied(template, worker)
    group["groupName"] = re.sub(r"[^a-z0-9]+", "-", f"{pool.wish.name}-{name}".lower()).strip("-")
    group["replicas"] = group["maxReplicas"] = pool.replicas
    group["minReplicas"] = 0
    group["rayStartParams"] = {**group["rayStartParams"], "resources": _start_param({resource: 1})}
    pod = group["template"]["spec"]
    pod["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    pod |= _placed(pool, worker.node_labels)
    gpus = {"nvidia.com/gpu": str(len(pool.gpus))}
    pod["containers"][0]["resources"] = {
        "requests": {"cpu": str(worker.cpus), "memory": worker.memory} | gpus,
        "limits": {"memory": worker.memory} | gpus,
    }
    return group


def _copied(template: GroupSpec, worker: Worker) -> GroupSpec:
    """A group like the base's, with a cache of its own where that is asked for: the shared one is gone then."""
    group = copy.deepcopy(template)
    if worker.own_cache:
        pod = group["template"]["spec"]
        pod["volumes"] = [_own(volume, worker.own_cache) for volume in pod["volumes"]]
    return group


def _own(volume: dict[str, Any], size: str) -> dict[str, Any]:
    """The volume, or in place of the shared cache one that lives and dies with the pod."""
    if volume.get("persistentVolumeClaim", {}).get("claimName") != CACHE_CLAIM:
        return volume
    claim = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": size}}}
    return {"name": volume["name"], "ephemeral": {"volumeClaimTemplate": {"spec": claim}}}


def _start_param(resources: Mapping[str, int]) -> str:
    """`ray start --resources` as KubeRay and the autoscaler expect it: JSON in double quotes, escaped for the shell."""
    return '"' + json.dumps(resources).replace('"', '\\"') + '"'


def _placed(pool: Pool, node_labels: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """Where the pods may run: nodes with the pool's kind of GPU."""
    kinds = {gpu.name for gpu in pool.gpus}
    if len(kinds) > 1:
        raise ConfigError(
            f"model {pool.wish.name}: a replica on {', '.join(sorted(kinds))} can't be asked of Kubernetes, which "
            "counts the GPUs of a node and doesn't tell their kinds; plan for nodes of one kind each"
        )
    (gpu,) = set(pool.gpus)
    if gpu.name in node_labels:
        key, value = node_labels[gpu.name]
        return {"nodeSelector": {key: value}}
    products = _PRODUCTS.get(_card_name(gpu), ())
    if not products:
        raise ConfigError(
            f"GPU {gpu.name}: which nodes have it? Give their label: --node-label '{gpu.name}:KEY=VALUE' "
            f"(`kubectl get nodes -L {PRODUCT_LABEL}` shows what there is)"
        )
    expression = {"key": PRODUCT_LABEL, "operator": "In", "values": list(products)}
    terms = {"nodeSelectorTerms": [{"matchExpressions": [expression]}]}
    return {"affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": terms}}}


def _card_name(gpu: Gpu) -> str:
    card = find_card(gpu.name, gpu.memory_bytes)
    return card.name if card else gpu.name


def _kustomization(base: str, worker: Worker, *, autoscaling: bool) -> dict[str, Any]:
    image, _, tag = worker.image.rpartition(":")
    patches: list[dict[str, Any]] = [
        {"target": {"kind": "RayService", "name": "headroom"}, "path": "workers.yaml"},
        {"target": {"kind": "PodMonitor", "name": "headroom"}, "patch": dump(_METRICS_KEY)},
    ]
    components = ["serve-config", "autoscaling"] if autoscaling else ["serve-config"]
    if worker.own_cache:
        claim = {"$patch": "delete", "apiVersion": "v1", "kind": "PersistentVolumeClaim"}
        patches.append({"patch": dump({**claim, "metadata": {"name": CACHE_CLAIM}})})
    return {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": "headroom",
        "resources": [base],
        "components": [f"{base.removesuffix('/base')}/components/{name}" for name in components],
        "configMapGenerator": [
            {"name": "headroom-serve-config", "behavior": "replace", "files": ["serve_config.yaml"]}
        ],
        "images": [{"name": "headroom", "newName": image, "newTag": tag}],
        "patches": patches,
    }


def parse_node_labels(texts: Sequence[str]) -> dict[str, tuple[str, str]]:
    """`L4:cloud.example.com/accelerator=l4` -> {"L4": (key, value)}.

    Raises:
        ConfigError: written otherwise.
    """
    found = {}
    for text in texts:
        match = re.fullmatch(r"([^:]+):([^=]+)=(.+)", text)
        if match is None:
            raise ConfigError(f"--node-label {text!r}: write GPU:KEY=VALUE, such as L4:example.com/gpu=l4")
        found[match[1]] = (match[2], match[3])
    return found
