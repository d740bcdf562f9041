"""Penalties and seeds through the whole engine: the paged history is right whatever the schedule, and so are the draws.

The oracle of greedy penalties is `generate()`. Random draws have none; they must be the same under every schedule.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from deployments.engine.loader import LoadedModel, load
from deployments.engine.loop import Engine
from deployments.engine.messages import EngineLimits
from deployments.protocol import GenerationRequest, Sampling
from placement.footprint import footprint
from placement.hardware import virtual_cpu_devices
from placement.plan import Plan, solve
from tests.arrivals import tokens_of

VOCAB, OUTPUT, PENALTY = 96, 24, 1.6
LIMITS = EngineLimits(max_batch_tokens=512, max_sequences=32, prefix_cache=True, threads=1)


def make_prompts() -> list[tuple[int, ...]]:
    """Half of them start alike, so that blocks of one prompt hold the history of another."""
    draw = random.Random(5)
    shared = [draw.randrange(2, VOCAB) for _ in range(17)]
    own = [[draw.randrange(2, VOCAB) for _ in range(draw.choice((1, 6, 21)))] for _ in range(12)]
    return [tuple((shared if i % 2 else []) + ids) for i, ids in enumerate(own)]


PROMPTS = make_prompts()


@dataclass(frozen=True)
class Tiny:
    plan: Plan
    model: LoadedModel
    expected: list[tuple[int, ...]]
    """What `generate()` makes of `PROMPTS` under a repetition penalty."""


@pytest.fixture(scope="module", params=[1, 2], ids=lambda n: f"{n}-stage")
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder: Path = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).float().eval()
    model.save_pretrained(folder)
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, repetition_penalty=PENALTY,
            max_new_tokens=OUTPUT, eos_token_id=None,
        )  # fmt: skip
        expected.append(tuple(out[0, len(prompt) :].tolist()))
    plan = solve(
        footprint(folder, quantization="fp32", dtype="float32"),
        virtual_cpu_devices(("40MB",) * request.param),
        block_size=4,
        max_batch_tokens=512,
        max_sequences=32,
        max_context=64,
    )
    return Tiny(plan, load(folder, plan, device_type="cpu"), expected)


def run(
    tiny: Tiny, limits: EngineLimits, sampling: Iterable[Sampling], blocks: int | None = None
) -> list[tuple[int, ...]]:
    """All prompts at once, twice over, so that the second round finds its prefixes cached; both must agree."""
    plan = tiny.plan if blocks is None else replace(tiny.plan, num_blocks=blocks)
    engine = Engine(tiny.model, plan, limits)
    outputs: dict[str, tuple[int, ...]] = {}
    for turn in "ab":
        requests = [
            GenerationRequest(f"{turn}{i}", prompt, how)
            for i, (prompt, how) in enumerate(zip(PROMPTS, sampling, strict=True))
        ]
        outputs |= tokens_of(engine, requests, per_step=len(requests))
    assert blocks is None or engine.scheduler.preemptions > 0
    engine.close()
    first, second = ([outputs[f"{turn}{i}"] for i in range(len(PROMPTS))] for turn in "ab")
    assert first == second
    return first


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("blocks", [None, 24], ids=["ample", "preempted"])
def test_a_repetition_penalty_is_generates_own(tiny: Tiny, lookahead: Literal[0, 1], blocks: int | None) -> None:
    greedy = Sampling(max_tokens=OUTPUT, seed=0, temperature=0.0, repetition_penalty=PENALTY)
    got = run(tiny, replace(LIMITS, lookahead=lookahead), [greedy] * len(PROMPTS), blocks)
    assert got == tiny.expected
    plain = run(tiny, LIMITS, [replace(greedy, repetition_penalty=1.0)] * len(PROMPTS))
    assert plain != got, "a penalty that changes nothing would show nothing"


def test_draws_are_the_same_under_every_schedule(tiny: Tiny) -> None:
    mixed = [
        Sampling(max_tokens=OUTPUT, seed=0, frequency_penalty=0.8, presence_penalty=0.3, top_p=0.9),
        Sampling(max_tokens=OUTPUT, seed=0, top_k=20, temperature=0.8),
        Sampling(max_tokens=OUTPUT, seed=0, min_tokens=5, end_ids=(7,), repetition_penalty=1.2, min_p=0.02),
    ]
    sampling = [replace(mixed[i % 3], seed=i) for i in range(len(PROMPTS))]
    expected = run(tiny, replace(LIMITS, lookahead=0), sampling)
    assert run(tiny, replace(LIMITS, lookahead=1), sampling) == expected
    assert run(tiny, replace(LIMITS, max_batch_tokens=9, prefix_cache=False), sampling) == expected
    assert run(tiny, LIMITS, sampling, blocks=24) == expected
