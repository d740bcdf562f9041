"""A Serve config for random weights of a real shape: what `serve_load --shape` serves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import yaml

from benchmarks.child import ROOT
from benchmarks.client import LoadFailed


def write_config(shape: str, quantization: str, ingress: int, folder: Path) -> Path:
    """Write the checkpoint, where it is not there yet, and a config in `folder` that serves it.

    Args:
        shape: one of benchmarks.checkpoint.
        ingress: ingress replicas, each a process.

    Raises:
        LoadFailed: the checkpoint could not be written.
    """
    # In a process of its own: one that used a GPU keeps some of its memory until it ends.
    command = [sys.executable, "-m", "benchmarks.checkpoint", shape]
    written = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if written.returncode:
        said = written.stderr.strip().splitlines() or [f"its process ended with code {written.returncode}"]
        raise LoadFailed(f"no checkpoint of shape {shape}: {said[-1]}")
    model = {
        "name": f"random-{shape}",
        "source": written.stdout.strip().splitlines()[-1],
        "pools": [{"quantization": quantization}],
    }
    application = {
        "name": "headroom",
        "route_prefix": "/",
        "import_path": "deployments.app:build",
        "args": {"models": [model], "api": {"replicas": ingress}},
    }
    path = folder / f"random-{shape}.yaml"
    path.write_text(yaml.safe_dump({"applications": [application]}, sort_keys=False))
    return path
