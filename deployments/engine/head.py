"""The head, quantised like the linears before it; transformers leaves it in 16 bits, as it does whatever is tied."""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.nn import modules
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers.base import HfQuantizer

from deployments.engine.eight_bit import int8_parameter

bitsandbytes: Any = modules


def quantise_head(model: PreTrainedModel, config: BitsAndBytesConfig) -> None:
    """Quantise the head of `model` as `config` says, where it is loaded unquantised.

    A head that is tied to the embedding becomes a quantised copy of it, and its embedding stays. The model's config
    says so afterwards: `save_pretrained` writes a checkpoint that `from_pretrained` reads as it is.
    """
    head: Any = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        return
    name = next(path for path, module in model.named_modules() if module is head)
    skipped = sorted(set(HfQuantizer.get_modules_to_not_convert(model)) - {name})
    new = _four_bit(head, config) if config.load_in_4bit else _eight_bit(head, config)
    new.bias = head.bias
    model.set_submodule(name, new.train(head.training))
    for part in {id(each): each for each in (model.config, model.config.get_text_config())}.values():
        part.tie_word_embeddings = False
    # transformers looks ties up here when it saves.
    model.all_tied_weights_keys = {
        target: source
        for target, source in model.all_tied_weights_keys.items()
        if f"{name}.weight" not in (target, source)
    }
    stored: Any = getattr(model.config, "quantization_config", None)
    if stored is not None:
        stored.llm_int8_skip_modules = skipped


def _four_bit(head: nn.Linear, config: BitsAndBytesConfig) -> Any:
    with torch.device("meta"):
        new: Any = bitsandbytes.Linear4bit(
            head.in_features,
            head.out_features,
            head.bias is not None,
            config.bnb_4bit_compute_dtype,
            compress_statistics=config.bnb_4bit_use_double_quant,
            quant_type=config.bnb_4bit_quant_type,
        )
    weight: Any = bitsandbytes.Params4bit(
        head.weight.detach(),
        requires_grad=False,
        compress_statistics=config.bnb_4bit_use_double_quant,
        quant_type=config.bnb_4bit_quant_type,
        module=new,
    )
    new.weight = weight.to(head.weight.device)
    return new


def _eight_bit(head: nn.Linear, config: BitsAndBytesConfig) -> Any:
    with torch.device("meta"):
        new: Any = bitsandbytes.Linear8bitLt(
            head.in_features,
            head.out_features,
            head.bias is not None,
            has_fp16_weights=False,
            threshold=config.llm_int8_threshold,
        )
    new.weight = int8_parameter(head.weight.detach())
    return new
