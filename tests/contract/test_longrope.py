"""A model whose factors change beyond its original length: served up to that, as `generate()` answers each request."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from deployments.engine.loader import load
from placement.errors import PlacementError
from placement.footprint import footprint
from placement.hardware import virtual_cpu_devices
from placement.plan import Plan, solve
from tests.contract.families import VOCAB
from tests.contract.greedy import LIMITS, OUTPUT, generated, make_prompts, run, save

PROMPTS = make_prompts()
ORIGINAL = max(map(len, PROMPTS)) + OUTPUT
"""What the longest request takes, exactly."""
PHI3 = transformers.Phi3Config(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128,
    vocab_size=VOCAB, pad_token_id=0, max_position_embeddings=16 * ORIGINAL, original_max_position_embeddings=ORIGINAL,
    rope_parameters={
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8
    },
)  # fmt: skip


def planned(folder: Path, max_context: int | None = None) -> Plan:
    return solve(
        footprint(folder, quantization="fp32", name="phi"),
        virtual_cpu_devices(("8MB",)),
        block_size=4,
        max_batch_tokens=256,
        max_sequences=16,
        max_context=max_context,
    )


def test_up_to_the_original_length_tokens_equal_generate(tmp_path: Path) -> None:
    folder = save(PHI3, tmp_path)
    plan = planned(folder)
    assert plan.max_context == ORIGINAL
    expected = generated(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), PROMPTS)
    outputs, _ = run(load(folder, plan, device_type="cpu"), plan, LIMITS, PROMPTS)
    assert [outputs[str(i)] for i in range(len(PROMPTS))] == list(expected)


def test_more_is_refused(tmp_path: Path) -> None:
    PHI3.save_pretrained(tmp_path)
    whole = 16 * ORIGINAL
    told = f"max_context is {ORIGINAL + 1} tokens, but phi was made for {ORIGINAL}, .* up to {whole}.*; lower it"
    with pytest.raises(PlacementError, match=told):
        planned(tmp_path, ORIGINAL + 1)
