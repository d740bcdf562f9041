"""The engine's process with faults on demand: `python -m tests.failing_engine FD`.

As long as the file that FAULT names is there, what it says strikes before each step:

    nan       weights of the last layer are not numbers
    memory    the device has no byte left to give
    assert    a kernel fails on the device (CUDA), and the host hears of it later
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deployments.engine import process
from deployments.engine.loop import Engine
from deployments.protocol import TokenChunk

FAULT = Path(os.environ["FAULT"])
_TAKEN: list[Tensor] = []


class FailingEngine(Engine):
    """Fails as it is told."""

    def __init__(self, model: Any, *args: Any) -> None:
        super().__init__(model, *args)
        last = model.stages[-1]
        self._device: torch.device = last.device
        self._weights = [p.data for p in last.layer_modules[-1].parameters() if p.dtype.is_floating_point]
        self._good = [weight.clone() for weight in self._weights]

    def step(self) -> list[TokenChunk]:
        """One step, with what strikes before it."""
        fault = FAULT.read_text() if FAULT.exists() else ""
        with torch.inference_mode():
            for weight, good in zip(self._weights, self._good, strict=True):
                weight.fill_(float("nan")) if fault == "nan" else weight.copy_(good)
        if fault == "memory":
            _take_all(self._device)
        elif fault == "assert":
            torch.zeros(1, device=self._device)[torch.tensor([7], device=self._device)]
        return super().step()


def _take_all(device: torch.device) -> None:
    """Cap the process at what it has, and take what of it is free; what main memory has no end to, fails here."""
    if device.type == "cpu":
        torch.empty(2**60, dtype=torch.uint8)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved(device) / total, device)
    for size in (2**26, 2**21, 2**18, 2**14, 512):
        try:
            while True:
                _TAKEN.append(torch.empty(size, dtype=torch.uint8, device=device))
        except torch.OutOfMemoryError:
            continue


if __name__ == "__main__":
    vars(process)["Engine"] = FailingEngine
    sys.exit(process.main(sys.argv))
