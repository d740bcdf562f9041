"""GPTQ and AWQ checkpoints: on the CPU as transformers loads them through GPTQModel, on GPUs without it.

Of GPTQModel's kernels the plain torch ones are used: they keep the tensors as a checkpoint stores them, so that what is
resident is what the plan says, and compute the same for every batch. Its int4 kernels for the CPU repack at the first
forward, and round the scales. On GPUs `grouped_stored` reads the checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from deployments.engine.grouped_stored import stored_options
from deployments.engine.kernels.modules import CAPABILITY, why_not_on
from deployments.errors import ConfigError
from placement.plan import Plan

_BACKENDS = {"gptq": "gptq_torch", "awq": "torch_awq"}
_TABLES = ("wf_unsqueeze_zero", "wf_unsqueeze_neg_one")


def grouped_options(model_dir: Path, *, on_gpu: bool = False) -> dict[str, Any]:
    """What `from_pretrained` is told to have those kernels, or on GPUs to read what is stored; nothing for what is
    neither GPTQ nor AWQ.

    In the config, as if the checkpoint asked for them: told beside it, transformers warns that it follows.
    """
    config = AutoConfig.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    stored = getattr(config, "quantization_config", None) or {}
    backend = _BACKENDS.get(str(stored.get("quant_method")))
    if backend is None:
        return {}
    config.quantization_config = stored_options(model_dir, stored) if on_gpu else stored | {"backend": backend}
    return {"config": config}


def check_kernels(plan: Plan, *, kernels: bool) -> None:
    """Refuse a GPU's replica of such a checkpoint that is to do without Headroom's kernels.

    Raises:
        ConfigError: `kernels` is not set, or they can't run on one of the plan's GPUs.
    """
    if not kernels:
        raise ConfigError(
            f"{plan.model} is quantised by GPTQ or AWQ, which on GPUs Headroom's kernels alone compute with; set "
            "`kernels: headroom`"
        )
    for stage in plan.stages:
        if reason := why_not_on(torch.device("cuda", stage.device)):
            raise ConfigError(
                f"{plan.model} is quantised by GPTQ or AWQ, which on GPUs Headroom's kernels alone compute with: "
                f"{reason}; take a GPU of capability {'{}.{}'.format(*CAPABILITY)} or above, or `device: cpu`, or "
                "serve the unquantised model"
            )


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
