"""`batch_invariant`: a request's logits, tokens and log-probabilities have the same bits whatever is in its steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DbrxConfig, PreTrainedConfig

from deployments.engine.attention import RowSpan
from deployments.engine.invariant import ROWS, Piece, passes
from deployments.engine.loader import LoadedModel, load
from deployments.engine.loop import Engine
from deployments.engine.messages import EngineLimits
from deployments.engine.stages import StepRows, run_stages
from deployments.errors import ConfigError
from deployments.planning import plan_pool
from deployments.protocol import GenerationRequest, Sampling, TokenChunk
from deployments.settings import PoolSettings
from placement.plan import Plan
from tests.arrivals import chunks_of
from tests.contract.families import CONFIGS
from tests.contract.greedy import generated, make_prompts, save

BLOCK = 4
LIMITS = EngineLimits(max_batch_tokens=64, max_sequences=8, prefix_cache=True, threads=1, batch_invariant=True)
IDS = tuple((37 * i + 5) % 256 for i in range(45))


def loaded(folder: Path, **options: Any) -> tuple[LoadedModel, Plan]:
    small = {"device": "cpu", "block_size": BLOCK, "max_sequences": 8, "max_batch_tokens": 64, "max_context": 64}
    pool = PoolSettings.model_validate(small | {"cpu_device_memory": "40MB", "batch_invariant": True} | options)
    plan, _ = plan_pool("tiny", folder, pool)
    return load(folder, plan, device_type="cpu", limits=LIMITS), plan


# Who runs where


def test_every_row_is_in_one_piece_of_its_own_run() -> None:
    spans = (RowSpan(30, 1, (0,) * 8), RowSpan(0, 20, (1,) * 5), RowSpan(13, 7, (2,) * 5))
    found = passes(spans, 33)
    assert found[0] == (Piece(0, 1, 30, (0,) * 8), Piece(1, 15, 0, (1,) * 5))
    assert found[1] == (
        Piece(0, 1, 15, (1,) * 5),
        Piece(1, 4, 16, (1,) * 5),
        Piece(5, 3, 13, (2,) * 5),
        Piece(8, 4, 16, (2,) * 5),
    )
    assert found[2] == ()  # padding alone
    for piece in (piece for each in found for piece in each):
        assert piece.place + piece.count <= ROWS
        assert piece.keys % ROWS == 0
        assert piece.keys >= piece.start + piece.count > piece.keys - ROWS


# Logits


def compute(model: LoadedModel, *parts: tuple[int, int, int]) -> list[Tensor]:
    """The logits of each part (start, end, first block) of copies of IDS, in one step."""
    spans = tuple(RowSpan(start, end - start, tuple(range(first, first + 12))) for start, end, first in parts)
    positions = tuple(p for start, end, _ in parts for p in range(start, end))
    step = StepRows(tuple(IDS[p] for p in positions), positions, spans, tuple(range(len(positions))))
    return list(run_stages(model.stages, step, BLOCK).split([end - start for start, end, _ in parts]))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Llama", {"quantization": "nf4", "dtype": "float32", "stages": 2}),
        ("Llama", {"quantization": "nf4", "dtype": "bfloat16", "quantize_head": True}),
        ("Qwen2", {"quantization": "int8", "dtype": "float32"}),
        ("Gemma 2", {"quantization": "fp4", "dtype": "float32"}),
        ("Mistral", {"quantization": "bf16"}),
        ("Qwen3", {"quantization": "nf4", "dtype": "float32"}),
        ("OPT", {"quantization": "int8", "dtype": "float32"}),
        ("GPT-NeoX", {"quantization": "nf4", "dtype": "bfloat16"}),
        ("Mixtral", {"quantization": "fp32", "stages": 2}),
        ("Mixtral", {"quantization": "nf4", "dtype": "float32", "quantize_experts": True}),
        ("Mixtral", {"quantization": "int8", "dtype": "bfloat16", "quantize_experts": True}),
        ("Qwen3 MoE", {"quantization": "bf16"}),
        ("Qwen3 MoE", {"quantization": "nf4", "dtype": "bfloat16", "double_quant": True, "quantize_experts": True}),
    ],
)
def test_rows_have_the_same_bits_in_any_step(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model, _ = loaded(save(CONFIGS[name], tmp_path), **options)
    (whole,) = compute(model, (0, 45, 0))
    # In chunks, beside other sequences, and one token at a time.
    cut, other, rest = compute(model, (0, 7, 12), (0, 29, 24), (0, 1, 36))
    assert torch.equal(cut, whole[:7])
    assert torch.equal(other, whole[:29])
    assert torch.equal(rest, whole[:1])
    middle, ahead = compute(model, (7, 30, 12), (29, 45, 24))
    assert torch.equal(middle, whole[7:30])
    assert torch.equal(ahead, whole[29:])
    for position, others in ((30, 0), (32, 3), (37, 1), (44, 2)):
        mates = [(p, p + 1, 0) for p in range(others)]  # all write what is there already
        *_, one = compute(model, *mates, (position, position + 1, 24))
        assert torch.equal(one[0], whole[position]), position


# Requests


def requests() -> list[GenerationRequest]:
    """Every third drawn, the others greedy; all with log-probabilities."""
    return [
        GenerationRequest(f"{i}", prompt, Sampling(max_tokens=6, seed=i, temperature=0.0 if i % 3 else 0.9, logprobs=3))
        for i, prompt in enumerate(make_prompts())
    ]


def run(engine: Engine, asked: list[GenerationRequest], per_step: int) -> dict[str, list[TokenChunk]]:
    """The chunks of each, whatever of the prompt was cached."""
    found = chunks_of(engine, asked, per_step=per_step)
    return {key: [chunk._replace(cached_tokens=0) for chunk in chunks] for key, chunks in found.items()}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Llama", {"quantization": "fp32"}),
        ("Mixtral", {"quantization": "bf16"}),
        ("Qwen3 MoE", {"quantization": "nf4", "dtype": "float32", "quantize_experts": True}),
    ],
)
def test_requests_are_answered_alike_alone_and_together(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model, plan = loaded(save(CONFIGS[name], tmp_path), **options)
    engine = Engine(model, plan, replace(LIMITS, prefix_cache=False))
    alone = {key: chunks for request in requests() for key, chunks in run(engine, [request], 1).items()}
    assert len({tuple(chunk.token_ids for chunk in chunks) for chunks in alone.values()}) > 3
    assert all(chunk.logprobs for chunks in alone.values() for chunk in chunks)
    assert run(engine, requests(), 100) == alone
    cached = Engine(model, plan, replace(LIMITS, max_batch_tokens=13, prefill_chunk_tokens=5))
    assert run(cached, requests(), 2) == alone
    assert run(cached, requests(), 3) == alone  # prefixes are found now
    scarce_plan = replace(plan, num_blocks=16)
    scarce = Engine(model, scarce_plan, LIMITS)
    assert run(scarce, requests(), 100) == alone
    assert scarce.scheduler.preemptions > 0


@pytest.mark.parametrize("name", ["Gemma 2", "Mixtral", "Qwen3 MoE"])
def test_greedy_tokens_equal_generate(name: str, tmp_path: Path) -> None:
    folder = save(CONFIGS[name], tmp_path)
    outputs = generated(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), make_prompts())
    model, plan = loaded(folder, quantization="fp32")
    assert model.attention == "torch, batch-invariant"
    found = run(Engine(model, plan, LIMITS), [
        replace(request, sampling=replace(request.sampling, temperature=0.0)) for request in requests()
    ], 2)  # fmt: skip
    assert [tuple(t for c in chunks for t in c.token_ids) for chunks in found.values()] == list(outputs)


# What it does not serve

DBRX = DbrxConfig(
    d_model=64,
    n_heads=4,
    n_layers=2,
    max_seq_len=256,
    vocab_size=256,
    bos_token_id=0,
    eos_token_id=1,
    attn_config={"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
    ffn_config={"ffn_hidden_size": 64, "hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DBRX, "batch_invariant does not serve DbrxForCausalLM: .*ffn.experts computes as many rows at once"),
        (CONFIGS["BLOOM"], "batch_invariant needs paged attention, and on it BloomForCausalLM can't be served"),
    ],
    ids=["DBRX", "BLOOM"],
)
def test_models_that_mix_rows_are_refused(config: PreTrainedConfig, message: str, tmp_path: Path) -> None:
    folder = save(config, tmp_path)
    with pytest.raises(ConfigError, match=message) as caught:
        loaded(folder, quantization="fp32")
    assert "\n" not in str(caught.value)
