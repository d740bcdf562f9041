"""The oracle of the GPU tests: the same quantised model's plain forward, told the tokens that the engine chose.

Kernels on a GPU round differently for each batch, so tokens are not compared with `generate()`: each must be the plain
forward's best, or so close below it that rounding may have decided. Its log-probability and those of the likeliest ones
must be the plain forward's, but for rounding.

Bounds are in standard deviations of the logits. They follow from what one forward rounds: of 1,053 positions of each
model of these tests, on a CPU, in 16 bits against float32 of the same weights, the log-probabilities of the five
likeliest tokens were off by up to 0.055 (test_engine_gpu.py), and two forwards that round otherwise can be twice as far
apart. Faults are larger: a window of one token more or less 0.34 at least, positions off by one 2.8 (docs/log.md).
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
from deployments.protocol import GenerationRequest, Sampling, TokenLogprob
from placement import probe
from placement.footprint import Footprint
from placement.plan import Plan, solve

BLOCK = 16
LIMITS = EngineLimits(max_batch_tokens=256, max_sequences=16, prefix_cache=True, threads=1)
LENGTHS = (5, 33, 90, 250, 270, 16, 129, 48)
"""Of the prompts: parts of a block, whole blocks, more than a step takes, and decodes on both sides of 256."""
OUTPUT = 32
"""Tokens for each, 256 in all."""
LIKELIEST = 5
BOUND = 0.15
COARSE = 0.2
"""The bound where the oracle rounds activations to 8 bits, as bitsandbytes does in int8: up to 0.104 alone."""

Served = list[tuple[tuple[int, ...], list[TokenLogprob]]]
"""Prompts, and the tokens chosen for each with their log-probabilities."""


def plain_model(folder: Path, plan: Plan) -> PreTrainedModel:
    """transformers' own, with bitsandbytes' linears, whole on the first GPU."""
    options = {} if (config := quantization_config(plan)) is None else {"quantization_config": config}
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, plan.dtype), device_map={"": 0}, local_files_only=True, **options
    )
    model.train(False)
    return model


@torch.inference_mode()
def logits_of(plain: PreTrainedModel, prompt: Sequence[int], chosen: Sequence[int]) -> Tensor:
    """What each chosen token was chosen from: float32 [chosen tokens, vocab] on the CPU."""
    ids = torch.tensor([[*prompt, *chosen]], device=plain.device)
    logits: Tensor = plain(ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.float().cpu()


def shortfalls(plain: PreTrainedModel, prompt: Sequence[int], chosen: Sequence[int]) -> Tensor:
    """How far the logit of each chosen token is below the best at its place: float32 [chosen tokens] on the CPU."""
    return below_best(logits_of(plain, prompt, chosen), chosen)


def below_best(logits: Tensor, chosen: Sequence[int]) -> Tensor:
    """[rows]: how far the logit of each row's chosen id is below the row's best; `logits` are [rows, vocab]."""
    return logits.max(-1).values - logits.gather(-1, torch.tensor(chosen)[:, None])[:, 0]


def misses(logits: Tensor, tokens: Sequence[TokenLogprob]) -> Tensor:
    """[rows]: how far, at most, the log-probabilities told of a row's token and of the likeliest ones are off, those by
    id and by rank; `logits` are [rows, vocab]."""
    table = logits.log_softmax(-1)
    told = [((token.token_id, token.logprob), *token.top) for token in tokens]
    ids = torch.tensor([[token_id for token_id, _ in row] for row in told])
    values = torch.tensor([[value for _, value in row] for row in told])
    by_rank = table.topk(ids.shape[1] - 1).values - values[:, 1:]
    return torch.cat([table.gather(-1, ids) - values, by_rank], dim=1).abs().max(-1).values


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
        max_context=320,
        max_memory=dict.fromkeys(range(stages), "4GiB"),
        **wishes,
    )


def serve(model: LoadedModel, plan: Plan) -> Served:
    """A prompt of each of `LENGTHS` at once, ids below 1,024, each with the `OUTPUT` tokens chosen greedily."""
    engine = Engine(model, plan, LIMITS)
    draw = random.Random(1)
    prompts = [tuple(draw.randrange(3, 1024) for _ in range(length)) for length in LENGTHS]
    greedy = Sampling(max_tokens=OUTPUT, seed=0, temperature=0.0, logprobs=LIKELIEST)
    for i, prompt in enumerate(prompts):
        engine.submit(GenerationRequest(f"{i}", prompt, greedy))
    outputs: dict[str, list[TokenLogprob]] = {f"{i}": [] for i in range(len(prompts))}
    while engine.has_work():
        for chunk in engine.step():
            assert chunk.error is None
            assert tuple(told.token_id for told in chunk.logprobs) == chunk.token_ids
            outputs[chunk.request_id] += chunk.logprobs
        engine.check_integrity()
    assert engine.blocks.held_blocks == 0
    engine.close()
    assert all(len(tokens) == OUTPUT for tokens in outputs.values())
    return list(zip(prompts, outputs.values(), strict=True))


def check(plain: PreTrainedModel, served: Served, bound: float, *, strays: float = 0.0) -> None:
    """No token is more than `bound` below the plain forward's best and no log-probability more than that off, in
    standard deviations of the logits; and four of five tokens are the best.

    Args:
        strays: the share of the tokens of which more may be off, up to 1: in a mixture rounding decides for another
            expert where two weigh nearly the same.
    """
    best, off = [], []
    for prompt, tokens in served:
        chosen = [token.token_id for token in tokens]
        logits = logits_of(plain, prompt, chosen)
        short = below_best(logits, chosen)
        best.append(short == 0)
        off.append(torch.maximum(short, misses(logits, tokens)) / logits.std())
    worst, right = torch.cat(off), torch.cat(best)
    far = int((~(worst <= bound)).sum())  # NaN is far too
    assert far <= strays * len(worst), f"{far} of {len(worst)} tokens are over {bound}, up to {worst.max():.3f}"
    assert bool((worst <= max(bound, 1.0)).all()), f"up to {worst.max():.3f} standard deviations off"
    assert int(right.sum()) >= 0.8 * len(right), f"{int(right.sum())} of {len(right)} tokens are the best"
