"""A model on this project's kernels, repacked and fused, saves what bitsandbytes' model saves, bit for bit.

On the CPU, where the linears hold the same bytes as on a GPU; `tests/gpu/test_kernels.py` runs the kernels.
"""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import modules as bitsandbytes
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from deployments.engine.head import quantise_head
from deployments.engine.kernels.fuse import fuse_linears
from deployments.engine.kernels.modules import QuantLinear4, QuantLinear8
from deployments.engine.residents import move_to_arena
from deployments.engine.stages import find_decoder, find_layers
from tests.contract.families import CONFIGS
from tests.contract.greedy import save

FOUR_BIT = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}
KINDS: dict[str, dict[str, Any]] = {
    "nf4": FOUR_BIT | {"bnb_4bit_quant_type": "nf4"},
    "fp4, double": FOUR_BIT | {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
}


def repack(model: Any) -> tuple[int, int]:
    """What `settle_layers` does on a GPU; linears replaced, groups fused."""
    count = 0
    for name, module in list(model.named_modules()):
        if isinstance(module, bitsandbytes.Linear4bit | bitsandbytes.Linear8bitLt):
            four = isinstance(module, bitsandbytes.Linear4bit)
            model.set_submodule(name, QuantLinear4.of(module) if four else QuantLinear8.of(module))
            count += 1
    groups = fuse_linears(model)
    for layer in find_layers(find_decoder(model)[1])[1]:
        move_to_arena(layer)
    return count, groups


@pytest.mark.parametrize(
    ("name", "hidden", "kind", "head", "fused"),
    [
        ("Llama", 64, "nf4", False, 4),
        ("Qwen2", 64, "int8", True, 4),
        ("Qwen2", 64, "fp4, double", True, 0),  # its linears have fewer than 256 scales
        ("Qwen2", 256, "fp4, double", True, 4),
        ("Gemma 2", 64, "nf4", True, 4),
    ],
)
def test_a_repacked_model_saves_bitsandbytes_checkpoint(
    name: str, hidden: int, kind: str, head: bool, fused: int, tmp_path: Path
) -> None:
    sized = deepcopy(CONFIGS[name])
    sized.hidden_size = hidden
    plain = save(sized, tmp_path / "plain")
    config = BitsAndBytesConfig(**KINDS[kind])
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32, quantization_config=config)
    if head:
        quantise_head(model, config)
    model.save_pretrained(tmp_path / "theirs")
    assert repack(model) == (14 + head, fused)
    model.save_pretrained(tmp_path / "ours")
    ours, theirs = (load_file(tmp_path / side / "model.safetensors") for side in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert (ours[key].dtype, ours[key].shape) == (tensor.dtype, tensor.shape), key
        assert torch.equal(ours[key], tensor), key
    configs = [json.loads((tmp_path / side / "config.json").read_text()) for side in ("ours", "theirs")]
    assert configs[0] == configs[1]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert sum(isinstance(m, bitsandbytes.Linear4bit | bitsandbytes.Linear8bitLt) for m in again.modules()) == 14 + head
