"""For every test: a state folder of the checkout's own, and a Ray environment set before anything imports Ray."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HEADROOM_HOME", str(Path(__file__).resolve().parent.parent / ".headroom"))
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach the real hub

# Tests wait for handle calls in threads without an event loop, which Serve's optimised mode has no room for. This is
# for the test process; the service that a test starts runs as `headroom serve` does.
os.environ["RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP"] = "1"

from deployments.home import state_folder
from deployments.local_ray import set_environment

set_environment(state_folder())
