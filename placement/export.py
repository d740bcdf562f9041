"""A plan in the forms that others read: accelerate's device_map and max_memory, Serve options, JSON, a table."""

from __future__ import annotations

from placement.hardware import DeviceType
from placement.plan import Plan


def device_map(plan: Plan, device_type: DeviceType = "cuda") -> dict[str, int | str]:
    """Module name -> device, as `from_pretrained(device_map=...)` takes it: indices on CUDA, "cpu" otherwise."""
    return {name: stage.device if device_type == "cuda" else "cpu" for stage in plan.stages for name in stage.modules}
