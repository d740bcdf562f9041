"""Random encoder-decoders of T5's kind."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForSeq2SeqLM, PreTrainedConfig


def save(config: PreTrainedConfig, folder: Path) -> Path:
    """A random model that says something else to each prompt and at each position."""
    torch.manual_seed(3)
    model = AutoModelForSeq2SeqLM.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "relative_attention_bias" in name:
                weight.mul_(16)
            elif name.endswith((".q.weight", ".v.weight", ".o.weight", ".wo.weight")):
                weight.mul_(4)
    model.save_pretrained(folder)
    return folder
