"""Ray and Headroom under a pod's locks (k8s/base/rayservice.yaml), in namespaces of this machine's kernel.

The locks alone are tried each time; `HEADROOM_POD=1` also starts Ray under them and serves the embedded model (a minute
or two).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.integration import pod

WRITABLE = ["/tmp", "/dev/shm", pod.HOME]
SERVES = os.environ.get("HEADROOM_POD") == "1"


@cache
def inside(*arguments: str) -> dict[str, Any]:
    if (reason := pod.why_not()) is not None:
        pytest.skip(f"namespaces are not allowed here: {reason}")
    line = pod.command([sys.executable, "-m", "tests.integration.pod_inside", *arguments])
    done = subprocess.run(line, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_the_locks_hold() -> None:
    found = inside("locks")
    assert found["ids"] == [1000, 100]
    assert found["capabilities"] == [0] * 5
    assert found["no_new_privs"] == "1"
    assert found["writable"] == WRITABLE
    assert found["networks"] == ["lo"]
    assert found["home_folders"] == []


def test_they_are_those_of_the_manifest() -> None:
    manifest = yaml.safe_load((Path(pod.ROOT) / "k8s/base/rayservice.yaml").read_text(encoding="utf-8"))
    for group in (
        manifest["spec"]["rayClusterConfig"]["headGroupSpec"],
        *manifest["spec"]["rayClusterConfig"]["workerGroupSpecs"],
    ):
        spec = group["template"]["spec"]
        [container] = spec["containers"]
        assert [spec["securityContext"][key] for key in ("runAsUser", "runAsGroup")] == inside("locks")["ids"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        mounted = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
        assert mounted - {"/models"} == {"/tmp", "/dev/shm", "/home/headroom"}


@pytest.mark.skipif(not SERVES, reason="takes minutes: HEADROOM_POD=1")
def test_ray_starts_and_headroom_serves_under_them() -> None:
    found = inside()
    assert (found["ids"], found["capabilities"], found["writable"]) == ([1000, 100], [0] * 5, WRITABLE)
    assert found["answer"]["ready"] == 200
    assert 1 <= found["answer"]["completion_tokens"] <= 8
    assert found["probes"] == {"startupProbe": 200, "livenessProbe": 200, "readinessProbe": 200}
    assert found["without_token"] == 401
    assert (found["uids"], found["root_processes"]) == ([1000], [])
    assert found["haproxy"] >= 1
