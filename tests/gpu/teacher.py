"""The oracle of the GPU tests: the same quantised model's plain forward, told the tokens that the engine chose.

Kernels on a GPU round differently for each batch, so tokens are not compared with `generate()`: each must be the plain
forward's best, or so close below it that rounding may have decided.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from deployments.engine.loader import LoadedModel, quantization_config
from deployments.engine.loop import Engine
from deployments.engine.messages import EngineLimits
from deployments.protocol import GenerationRequest, Sampling
from placement import probe
from placement.footprint import Footprint
from placement.plan import Plan, solve

BLOCK = 16
LIMITS = EngineLimits(max_batch_tokens=256, max_sequences=16, prefix_cache=True, threads=1)


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


def plan_on_gpus(weighed: Footprint, stages: int, **wishes: Any) -> Plan:
    """The plan of a replica on the first GPUs, as `LIMITS` say; skips the test where there are fewer than `stages`."""
    gpus = probe.cuda_gpus()
    if len(gpus) < stages:
        pytest.skip(f"needs {stages} GPUs, {len(gpus)} are visible")
    return solve(
        weighed,
        gpus[:stages],
        block_size=BLOCK,
        max_batch_tokens=LIMITS.max_batch_tokens,
        max_sequences=LIMITS.max_sequences,
        max_context=256,
        max_memory=dict.fromkeys(range(stages), "4GiB"),
        **wishes,
    )


def serve(model: LoadedModel, plan: Plan, output: int) -> list[tuple[tuple[int, ...], list[int]]]:
    """Twelve prompts of several lengths at once, ids below 1,024, each with the `output` tokens chosen greedily."""
    engine = Engine(model, plan, LIMITS)
    draw = random.Random(1)
    prompts = [tuple(draw.randrange(3, 1024) for _ in range(draw.choice((5, 33, 90)))) for _ in range(12)]
    for i, prompt in enumerate(prompts):
        engine.submit(GenerationRequest(f"{i}", prompt, Sampling(max_tokens=output, seed=0, temperature=0.0)))
    outputs: dict[str, list[int]] = {f"{i}": [] for i in range(len(prompts))}
    while engine.has_work():
        for chunk in engine.step():
            assert chunk.error is None
            outputs[chunk.request_id] += chunk.token_ids
        engine.check_integrity()
    assert engine.blocks.held_blocks == 0
    engine.close()
    assert all(len(chosen) == output for chosen in outputs.values())
    return list(zip(prompts, outputs.values(), strict=True))


def check(plain: PreTrainedModel, served: Sequence[tuple[tuple[int, ...], list[int]]], bound: float) -> None:
    """No token is more than `bound` below the plain forward's best, and four of five are that."""
    short = torch.cat([shortfalls(plain, prompt, chosen) for prompt, chosen in served])
    assert bool((short <= bound).all()), f"chose tokens {short.max():.3f} below the best"
    assert int((short == 0).sum()) >= 0.8 * len(short)
