"""The probe on a real Ray, in a process of its own: `ray.nodes()` has what `inventory_of` reads."""

from __future__ import annotations

import subprocess
import sys

from placement.hardware import Gpu, parse_inventory

_SCRIPT = """
import ray
from placement import probe
ray.init("local", num_cpus=3, num_gpus=2, resources={"accelerator_type:L4": 1}, include_dashboard=False,
         log_to_driver=False)
print(probe.inventory_text(probe.ray_inventory()))
assert ray.is_initialized(), "the probe leaves a connection that it did not open"
ray.shutdown()
"""


def test_a_ray_cluster_is_an_inventory() -> None:
    done = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    (node,) = parse_inventory(done.stdout).nodes
    assert (node.cpus, node.gpus) == (3, (Gpu.of("L4"),) * 2)
    assert node.memory_bytes > 0
