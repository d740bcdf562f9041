"""A quantised input embedding beside a tied head, and a gather cache, on GPUs as a replica runs them.

pytest tests/gpu/test_quantised_embedding_gpu.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from deployments.engine.embedding import QuantisedEmbedding, quantised_rows
from deployments.engine.experts import EightBitExperts, FourBitExperts
from deployments.engine.loader import load
from placement.footprint import footprint
from placement.plan import Plan
from tests.gpu.teacher import BOUND, COARSE, LIMITS, check, plain_model, plan_on_gpus, serve
from tests.unit.engine.tiny import save

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),  # FlashInfer's imports warn
]

CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": transformers.LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=1024, max_position_embeddings=512, tie_word_embeddings=True,
    ),
    "bloom": transformers.BloomConfig(hidden_size=256, n_layer=4, n_head=4, vocab_size=1024, seq_length=512),
}  # fmt: skip


def oracle(folder: Path, plan: Plan) -> PreTrainedModel:
    """transformers' own, its embedding the dequantised rows, its head as it was."""
    model = plain_model(folder, plan)
    embedding: Any = model.get_input_embeddings()
    made = quantised_rows(embedding.weight.detach(), plan, embedding.weight.device)
    eight = plan.quantization == "int8"
    rows = QuantisedEmbedding(EightBitExperts(made, embedding.weight.dtype) if eight else FourBitExperts(made))
    every = torch.arange(embedding.num_embeddings, device=embedding.weight.device)
    embedding.weight = nn.Parameter(rows(every), requires_grad=False)
    return model


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize(("name", "quantization"), [("llama", "nf4"), ("llama", "int8"), ("bloom", "nf4")])
def test_tokens_are_the_plain_forwards_argmax(name: str, quantization: str, stages: int, tmp_path: Path) -> None:
    save(tmp_path, CONFIGS[name], seed=0)
    plan = plan_on_gpus(footprint(tmp_path, quantization=quantization, embeddings=True), stages)
    model = load(tmp_path, plan, device_type="cuda", limits=LIMITS)
    assert model.attention.startswith("gather cache") == (name == "bloom")
    served = serve(model, plan)
    torch._dynamo.reset()
    check(oracle(tmp_path, plan), served, COARSE if quantization == "int8" else BOUND)
