"""The design's import boundaries: ruff really refuses what crosses them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def refused(path: str, source: str) -> set[str]:
    """Rules of the import boundaries that `source`, were it at `path`, would break."""
    ruff = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format=json", "--stdin-filename", path]
    done = subprocess.run([*ruff, "-"], input=source, cwd=ROOT, capture_output=True, text=True, check=False)
    return {entry["code"] for entry in json.loads(done.stdout)} & {"TID251", "TID253"}


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("placement/plan.py", "import ray\n"),
        ("placement/plan.py", "def f():\n    import torch\n"),
        ("placement/kv.py", "from transformers import AutoConfig\n"),
        ("placement/new.py", "from torch.nn import Linear\n"),
        ("deployments/engine/loop.py", "import ray\n"),
        ("deployments/engine/new.py", "def f():\n    from ray import serve\n"),
        ("deployments/engine/loop.py", "from deployments.api.codec import TextCodec\n"),
        ("deployments/routing/ledger.py", "from ray import serve\n"),
        ("deployments/protocol.py", "import ray\n"),
        ("deployments/protocol.py", "import torch\n"),
        ("deployments/api/app.py", "import ray\n"),
        ("deployments/api/app.py", "import torch\n"),
        ("deployments/replica.py", "import torch\n"),
        ("deployments/new.py", "import ray\n"),
    ],
)
def test_crossing_is_refused(path: str, source: str) -> None:
    assert refused(path, source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("placement/probe.py", "def f():\n    import torch\n"),
        ("placement/skeleton.py", "import torch\n"),
        ("deployments/engine/new.py", "import torch\n"),
        ("deployments/replica.py", "from ray import serve\n"),
        ("deployments/routing/router.py", "from ray import serve\n"),
        ("deployments/convert.py", "import torch\n"),
        ("tests/unit/new.py", "import ray\nimport torch\n"),
    ],
)
def test_what_the_design_allows_passes(path: str, source: str) -> None:
    assert not refused(path, source)
