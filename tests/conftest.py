"""For every test: a state folder of the checkout's own, and a Ray environment set before anything imports Ray."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HEADROOM_HOME", str(Path(__file__).resolve().parent.parent / ".headroom"))
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach the real hub

from deployments.home import state_folder
from deployments.local_ray import set_environment

set_environment(state_folder())
