"""What the tests of k8s/ read: the built overlays, by kustomize where it is installed."""

from __future__ import annotations

import copy
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

Manifest = dict[str, Any]

ROOT = Path(__file__).resolve().parents[2]
K8S = ROOT / "k8s"
OVERLAYS = sorted(p.parent.relative_to(K8S).as_posix() for p in (K8S / "overlays").rglob("kustomization.yaml"))
CRD = ROOT.parent / "shared" / "kuberay" / "ray.io_rayservices.v1.7.0.yaml"
"""KubeRay's definition of RayService, where somebody has put it; it is not ours to commit."""


def build(folder: Path) -> list[Manifest]:
    """The manifests of a kustomization; the test is skipped where neither kubectl nor kustomize is installed."""
    return [m for m in yaml.safe_load_all(build_text(folder)) if m]


@cache
def build_text(folder: Path) -> str:
    """What kustomize prints.

    Raises:
        ValueError: kustomize refused.
    """
    if kustomize := shutil.which("kustomize"):
        command = [kustomize, "build", str(folder)]
    elif kubectl := shutil.which("kubectl"):
        command = [kubectl, "kustomize", str(folder)]
    else:
        pytest.skip("neither kustomize nor kubectl is installed here")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(done.stderr.strip())
    return done.stdout


def crd_schema() -> dict[str, Any]:
    """RayService v1's schema as KubeRay has it; the test is skipped where its file is not there."""
    if not CRD.exists():
        pytest.skip(f"KubeRay's CRD is not at {CRD.parent.name}/{CRD.name} beside this checkout")
    return copy.deepcopy(_crd(CRD))


@cache
def _crd(path: Path) -> dict[str, Any]:
    versions = yaml.safe_load(path.read_text(encoding="utf-8"))["spec"]["versions"]
    schema: dict[str, Any] = next(v for v in versions if v["name"] == "v1")["schema"]["openAPIV3Schema"]
    return schema


def of_kind(manifests: list[Manifest], kind: str) -> list[Manifest]:
    """Those of one kind."""
    return [m for m in manifests if m["kind"] == kind]


def ray_service(manifests: list[Manifest]) -> Manifest:
    """The one RayService."""
    (service,) = of_kind(manifests, "RayService")
    return service


def groups(service: Manifest) -> list[Manifest]:
    """Its worker groups."""
    found: list[Manifest] = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    return found


def serve_config(service: Manifest) -> Manifest:
    """Its `serveConfigV2`, parsed."""
    config: Manifest = yaml.safe_load(service["spec"]["serveConfigV2"])
    return config


def pod_templates(manifests: list[Manifest]) -> Iterator[tuple[str, Manifest]]:
    """Every pod template with a name for messages."""
    for manifest in manifests:
        if manifest["kind"] == "RayService":
            cluster = manifest["spec"]["rayClusterConfig"]
            yield "head", cluster["headGroupSpec"]["template"]
            for group in cluster["workerGroupSpecs"]:
                yield group["groupName"], group["template"]
        elif manifest["kind"] in ("Job", "StatefulSet", "Deployment"):
            yield manifest["metadata"]["name"], manifest["spec"]["template"]


def planted(manifests: list[Manifest], mistake: Callable[[list[Manifest]], object]) -> list[Manifest]:
    """A copy of `manifests` with a mistake in it."""
    changed = copy.deepcopy(manifests)
    mistake(changed)
    assert changed != manifests, "nothing was planted"
    return changed
