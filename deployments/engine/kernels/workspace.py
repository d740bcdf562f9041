"""Memory that the kernels reuse: partial sums, arrival counters and one buffer for dequantised weights per device.

Allocated once, never freed: captured CUDA graphs keep the addresses. One set per device, so products on one device are
ordered on one stream; two streams that compute at once would overwrite each other's sums.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from deployments.engine.kernels.config import PANELS, PARTIAL_BYTES

BUFFER_BYTES = 128 * 2**20
"""Most bytes of dequantised weights at once; larger weights are dequantised and multiplied in runs of rows."""


@dataclass
class Workspace:
    """One device's."""

    partials: Tensor
    """float32 [PARTIAL_BYTES / 4]."""
    arrivals: Tensor
    """int32 [PANELS], zero between products."""
    buffer: Tensor
    """uint8: dequantised weights."""
    outgrown: list[Tensor]
    """Former buffers: graphs may name them."""


_workspaces: dict[torch.device, Workspace] = {}
_lock = threading.Lock()


def prepare(device: torch.device, buffer_bytes: int = 0) -> Workspace:
    """The workspace of `device`, with a buffer of at least `min(buffer_bytes, BUFFER_BYTES)`.

    Raises:
        RuntimeError: something must be allocated while a CUDA graph is captured: its zeros would not be written.
    """
    device = (
        torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" and device.index is None else device
    )
    buffer_bytes = min(buffer_bytes, BUFFER_BYTES)
    with _lock:
        have = _workspaces.get(device)
        if have is not None and have.buffer.numel() >= buffer_bytes:
            return have
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"the kernels' workspace on {device} needs {buffer_bytes:,} bytes, but a CUDA graph is being captured; "
                "call workspace.prepare() or run the product once before the capture"
            )
        buffer = torch.empty(buffer_bytes, dtype=torch.uint8, device=device)
        if have is not None:
            have.outgrown.append(have.buffer)
            have.buffer = buffer
            return have
        partials = torch.empty(PARTIAL_BYTES // 4, dtype=torch.float32, device=device)
        arrivals = torch.zeros(PANELS, dtype=torch.int32, device=device)
        return _workspaces.setdefault(device, Workspace(partials, arrivals, buffer, []))
