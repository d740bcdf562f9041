"""For every test: a state folder of the checkout's own, and a Ray environment set before anything imports Ray."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HEADROOM_HOME", str(Path(__file__).resolve().parent.parent / ".headroom"))
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach the real hub

# Tests wait for handle calls in threads without an event loop, which Serve's optimised mode has no room for. This is
# for the test process; the service that a test starts runs as `headroom serve` does.
os.environ["RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP"] = "1"

from deployments.home import state_folder
from deployments.local_ray import set_environment

set_environment(state_folder())


@pytest.fixture(scope="session")
def one_torch_thread() -> Iterator[None]:
    """From here to the end of the session: where tensors are tiny, more would only wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
