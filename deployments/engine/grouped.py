"""GPTQ and AWQ checkpoints, as transformers loads them through GPTQModel, on the CPU.

Of GPTQModel's kernels the plain torch ones are used: they keep the tensors as a checkpoint stores them, so that what is
resident is what the plan says, and compute the same for every batch. Its int4 kernels for the CPU repack at the first
forward, and round the scales.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AwqConfig, GPTQConfig
from transformers.utils.quantization_config import AwqBackend

from placement.plan import Plan

_TABLES = ("wf_unsqueeze_zero", "wf_unsqueeze_neg_one")


def grouped_config(plan: Plan) -> GPTQConfig | AwqConfig | None:
    """What `from_pretrained` is told beside what the checkpoint says; None for what is neither GPTQ nor AWQ."""
    method = plan.quantization.partition("-")[0]
    if method == "gptq":
        return GPTQConfig(bits=4, backend="gptq_torch")  # transformers takes the backend alone; the bits are stored
    return AwqConfig(backend=AwqBackend.TORCH_AWQ) if method == "awq" else None


def settle_grouped(model: nn.Module) -> None:
    """Undo what GPTQModel adds to each linear once it is loaded: torch.compile, which wants a C++ compiler and seconds
    for every shape; and tables of shifts, of which one for each width is enough."""
    tables: dict[tuple[str, int, torch.device], torch.Tensor] = {}
    for module in model.modules():
        vars(module).pop("dequantize_weight", None)
        buffers: dict[str, Any] = module._buffers
        for name in _TABLES:
            if (table := buffers.pop(name, None)) is not None:
                setattr(module, name, tables.setdefault((name, table.numel(), table.device), table))
