"""Frequencies stay those of the length that a model was made for, whatever positions a step has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from deployments.engine.rotary import fix_frequencies
from tests.unit.engine.tiny import llama

LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
PHI3 = transformers.Phi3Config(
    hidden_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
    vocab_size=64, pad_token_id=0, max_position_embeddings=256, original_max_position_embeddings=64,
    rope_parameters=LONGROPE,
)  # fmt: skip
DYNAMIC = llama(
    layers=1,
    max_position_embeddings=64,
    rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
)


def turned(model: Any, positions: list[int]) -> torch.Tensor:
    """[positions, head_dim]: the cosines."""
    cosines: torch.Tensor = model.model.rotary_emb(torch.zeros(1, 1, 64), torch.tensor([positions]))[0]
    return cosines[0]


@pytest.mark.parametrize("config", [PHI3, DYNAMIC], ids=["longrope", "dynamic"])
def test_a_position_beyond_turns_no_other(config: PreTrainedConfig) -> None:
    model = AutoModelForCausalLM.from_config(config)
    alone = turned(model, [5, 63])
    fix_frequencies(model)
    assert torch.equal(turned(model, [5, 63]), alone)
    assert torch.equal(turned(model, [5, 63, 64])[:2], alone)
    assert torch.equal(turned(model, [5, 63]), alone)


def test_types_of_layers_are_fixed_one_by_one() -> None:
    module: Any = nn.Module()
    module.rope_type = {"sliding_attention": "default", "full_attention": "longrope", "other": "yarn"}
    fix_frequencies(module)
    assert module.rope_type == {"sliding_attention": "default", "full_attention": "default", "other": "yarn"}
