"""Greedy tokens of a tiny model, however it is quantised: what `generate()` says, and what the engine says."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from deployments.engine.loader import LoadedModel
from deployments.engine.loop import Engine
from deployments.engine.messages import EngineLimits
from deployments.protocol import GenerationRequest, Sampling
from deployments.settings import PoolSettings
from placement.plan import Plan
from tests.arrivals import tokens_of
from tests.contract.families import VOCAB

OUTPUT = 6
LIMITS = EngineLimits(max_batch_tokens=256, max_sequences=16, prefix_cache=True, threads=1)


def make_prompts() -> tuple[tuple[int, ...], ...]:
    """Of 1 to 30 tokens; every third starts with the same 21."""
    draw = random.Random(5)
    shared = [draw.randrange(2, VOCAB) for _ in range(21)]
    return tuple(
        tuple((shared if i % 3 == 0 else []) + [draw.randrange(2, VOCAB) for _ in range(length)])
        for i, length in enumerate((3, 1, 24, 9, 2, 6))
    )


def pool(**options: Any) -> PoolSettings:
    """A pool of virtual devices that these models fit on."""
    small = {"device": "cpu", "block_size": 4, "max_sequences": 16, "max_batch_tokens": 256, "max_context": 64}
    return PoolSettings.model_validate(small | {"cpu_device_memory": "60MB", "dtype": "float32"} | options)


def rounded(weight: Tensor, quantization: str, double_quant: bool) -> Tensor:
    """What is left of weights that were quantised, whole: by rows (int8) or by blocks (nf4, fp4)."""
    if quantization == "int8":
        scales = weight.abs().amax(-1, keepdim=True) / 127
        return (weight / scales).round() * scales
    return dequantize_4bit(*quantize_4bit(weight, quant_type=quantization, compress_statistics=double_quant))


def save(config: PreTrainedConfig, path: Path) -> Path:
    """A random model in float32, whose outputs differ from prompt to prompt."""
    torch.manual_seed(3)
    for name in ("initializer_range", "init_std"):
        if hasattr(config, name):
            setattr(config, name, 0.1)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def generated(model: PreTrainedModel, prompts: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    """The oracle: each prompt alone through transformers."""
    model.eval()
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # it rounds inside
    outputs = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=OUTPUT, eos_token_id=None
        )
        outputs.append(tuple(out[0, len(prompt) :].tolist()))
    assert len(set(outputs)) > len(prompts) // 2, "an oracle that always says the same would show nothing"
    return tuple(outputs)


def answers(outputs: Sequence[tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """What `run` returns of an engine that says what `generated` did."""
    return {f"{i}": ids for i, ids in enumerate((*outputs, outputs[0]))}


def run(
    model: LoadedModel, plan: Plan, limits: EngineLimits, prompts: Sequence[tuple[int, ...]]
) -> tuple[dict[str, tuple[int, ...]], Engine]:
    """All prompts, two more at each step, and the first again at the end."""
    engine = Engine(model, plan, limits)
    waiting = [
        GenerationRequest(f"{i}", prompt, Sampling(max_tokens=OUTPUT, seed=i, temperature=0.0))
        for i, prompt in enumerate((*prompts, prompts[0]))
    ]
    outputs = tokens_of(engine, waiting, per_step=2)
    engine.close()
    return outputs, engine
