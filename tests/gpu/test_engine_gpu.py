"""The engine on CUDA, teacher-forced against the same quantised model's plain forward.

Kernels choose their splits by batch on a GPU, so tokens are not compared with `generate()`. Each token the engine chose
must be the plain forward's argmax wherever the gap to the next logit is above BOUND.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig

from deployments.engine.loader import load, quantization_config
from deployments.engine.loop import Engine
from deployments.engine.messages import EngineLimits
from deployments.protocol import GenerationRequest, Sampling
from placement import probe
from placement.footprint import footprint
from placement.plan import solve

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

BOUND = 0.05
OUTPUT = 24
_COMMON = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 1024}
_GLU = {**_COMMON, "intermediate_size": 512, "num_key_value_heads": 2, "max_position_embeddings": 512}
FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": transformers.LlamaConfig(**_GLU, tie_word_embeddings=True),
    "mistral": transformers.MistralConfig(**_GLU, sliding_window=24),
    "qwen3": transformers.Qwen3Config(**_GLU, head_dim=64),
    "gemma2": transformers.Gemma2Config(**_GLU, head_dim=64, sliding_window=24),
    "opt": transformers.OPTConfig(**_COMMON, ffn_dim=512, word_embed_proj_dim=128, max_position_embeddings=512),
    "gpt_neox": transformers.GPTNeoXConfig(**_COMMON, intermediate_size=512, max_position_embeddings=512),
}


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("quantization", ["nf4", "int8", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_the_plain_forwards_argmax(family: str, quantization: str, stages: int, tmp_path: Path) -> None:
    gpus = probe.cuda_gpus()
    if len(gpus) < stages:
        pytest.skip(f"needs {stages} GPUs, {len(gpus)} are visible")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(FAMILIES[family]).save_pretrained(tmp_path)
    plan = solve(
        footprint(tmp_path, quantization=quantization),
        gpus[:stages],
        block_size=16,
        max_batch_tokens=256,
        max_sequences=16,
        max_context=256,
    )
    engine = Engine(load(tmp_path, plan, device_type="cuda"), plan, EngineLimits(256, 16, True, 1))
    draw = random.Random(1)
    prompts = [tuple(draw.randrange(3, 1024) for _ in range(draw.choice((5, 33, 90)))) for _ in range(12)]
    for i, prompt in enumerate(prompts):
        engine.submit(GenerationRequest(f"{i}", prompt, Sampling(max_tokens=OUTPUT, seed=0, temperature=0.0)))
    outputs: dict[str, list[int]] = {f"{i}": [] for i in range(len(prompts))}
    while engine.has_work():
        for chunk in engine.step():
            assert chunk.error is None
            outputs[chunk.request_id] += chunk.token_ids
        engine.check_integrity()
    assert engine.blocks.held_blocks == 0

    plain = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=quantization_config(plan), dtype=torch.bfloat16, device_map={"": 0}
    )
    decided = 0
    for i, prompt in enumerate(prompts):
        chosen = outputs[f"{i}"]
        assert len(chosen) == OUTPUT
        with torch.inference_mode():
            logits = plain(torch.tensor([[*prompt, *chosen]], device="cuda")).logits[0, len(prompt) - 1 : -1].float()
        best, argmax = logits.max(-1)
        gap = best - logits.gather(-1, torch.tensor(chosen, device="cuda")[:, None])[:, 0]
        assert bool((gap <= BOUND).all()), f"chose tokens {gap.max().item():.3f} below the best"
        decided += int((argmax.cpu() == torch.tensor(chosen)).sum())
    assert decided >= 0.8 * OUTPUT * len(prompts)
