"""The oracle of the GPU tests: the same quantised model's plain forward, told the tokens that the engine chose.

Kernels on a GPU round differently for each batch, so tokens are not compared with `generate()`: each must be the plain
forward's best, or so close below it that rounding may have decided.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from deployments.engine.loader import quantization_config
from placement.plan import Plan


def plain_model(folder: Path, plan: Plan) -> PreTrainedModel:
    """transformers' own, with bitsandbytes' linears, whole on the first GPU."""
    options = {} if (config := quantization_config(plan)) is None else {"quantization_config": config}
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, plan.dtype), device_map={"": 0}, local_files_only=True, **options
    )
    model.train(False)
    return model


@torch.inference_mode()
def shortfalls(plain: PreTrainedModel, prompt: Sequence[int], chosen: Sequence[int]) -> Tensor:
    """How far the logit of each chosen token is below the best at its place: float32 [chosen tokens] on the CPU."""
    ids = torch.tensor([[*prompt, *chosen]], device=plain.device)
    return below_best(plain(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float().cpu(), chosen)


def below_best(logits: Tensor, chosen: Sequence[int]) -> Tensor:
    """[rows]: how far the logit of each row's chosen id is below the row's best; `logits` are [rows, vocab]."""
    return logits.max(-1).values - logits.gather(-1, torch.tensor(chosen)[:, None])[:, 0]
