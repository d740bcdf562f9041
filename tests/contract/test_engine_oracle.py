"""The engine's greedy tokens equal `generate()` on the same NF4 weights in float32, however the work is cut.

bitsandbytes' AVX512-BF16 path rounds inside, so it is off on both sides: the engine switches it off for float32, and
the oracle here does the same.
"""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedConfig

from deployments.engine.loader import LoadedModel, load
from deployments.engine.loop import Engine
from deployments.engine.messages import EngineLimits
from deployments.protocol import GenerationRequest, Sampling, TokenChunk
from placement.footprint import footprint
from placement.hardware import virtual_cpu_devices
from placement.plan import Plan, solve
from tests.arrivals import chunks_of

VOCAB = 256
OUTPUT = 14
_COMMON = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": VOCAB}
_GLU = {**_COMMON, "intermediate_size": 128, "num_key_value_heads": 2, "max_position_embeddings": 256, "head_dim": 16}
_ENDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": transformers.LlamaConfig(**_GLU, **_ENDS, tie_word_embeddings=True),
    "mistral": transformers.MistralConfig(**_GLU, **_ENDS, sliding_window=12),
    "qwen3": transformers.Qwen3Config(**_GLU, **_ENDS),
    "gemma2": transformers.Gemma2Config(**_GLU, **_ENDS, sliding_window=12),
    "gemma3": transformers.Gemma3TextConfig(**_GLU, **_ENDS, sliding_window=12),
    "opt": transformers.OPTConfig(**_COMMON, **_ENDS, ffn_dim=128, word_embed_proj_dim=32, max_position_embeddings=256),
    "gpt_neox": transformers.GPTNeoXConfig(**_COMMON, **_ENDS, intermediate_size=128, max_position_embeddings=256),
}


@dataclass(frozen=True)
class Oracle:
    folder: Path
    prompts: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[int, ...], ...]


def make_prompts() -> tuple[tuple[int, ...], ...]:
    """32 prompts of 1 to 60 tokens; a third of them start alike, so the prefix cache has something to find."""
    draw = random.Random(5)
    shared = [draw.randrange(2, VOCAB) for _ in range(33)]
    prompts = []
    for i in range(32):
        own = [draw.randrange(2, VOCAB) for _ in range(draw.choice((1, 3, 9, 20, 41, 60)))]
        prompts.append(tuple((shared if i % 3 == 0 else []) + own)[:60])
    return tuple(prompts)


@pytest.fixture(scope="module", params=FAMILIES)
def oracle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(FAMILIES[request.param]).save_pretrained(folder)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=torch.float32).eval()
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    prompts = make_prompts()
    outputs = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=OUTPUT,
            eos_token_id=None,
        )
        outputs.append(tuple(out[0, len(prompt) :].tolist()))
    assert len(set(outputs)) > 20, "an oracle that always says the same would show nothing"
    return Oracle(folder, prompts, tuple(outputs))


@pytest.fixture(scope="module", params=[1, 2, 3], ids=lambda n: f"{n}-stage")
def planned(request: pytest.FixtureRequest, oracle: Oracle) -> Plan:
    return solve(
        footprint(oracle.folder, quantization="nf4", dtype="float32"),
        virtual_cpu_devices(("40MB",) * request.param),
        block_size=4,
        max_batch_tokens=512,
        max_sequences=32,
        max_context=128,
    )


@pytest.fixture(scope="module")
def loaded(oracle: Oracle, planned: Plan) -> LoadedModel:
    return load(oracle.folder, planned, device_type="cpu")


def run(engine: Engine, requests: list[GenerationRequest], per_step: int = 1000) -> dict[str, list[TokenChunk]]:
    """Submit `per_step` requests before each step, and run until all have ended, at their limit of tokens."""
    chunks = chunks_of(engine, requests, per_step=per_step)
    assert {mine[-1].finish_reason for mine in chunks.values()} == {"length"}
    return chunks


def requests_of(oracle: Oracle, count: int, name: str = "r") -> list[GenerationRequest]:
    return [
        GenerationRequest(f"{name}{i}", oracle.prompts[i], Sampling(max_tokens=OUTPUT, seed=i, temperature=0.0))
        for i in range(count)
    ]


def check(oracle: Oracle, chunks: dict[str, list[TokenChunk]], name: str = "r") -> None:
    assert chunks
    for request_id, mine in chunks.items():
        ids = tuple(token for chunk in mine for token in chunk.token_ids)
        assert ids == oracle.outputs[int(request_id.removeprefix(name))], request_id


LIMITS = EngineLimits(max_batch_tokens=512, max_sequences=32, prefix_cache=True, threads=1)


@pytest.fixture(params=[0, 1], ids=lambda n: f"lookahead-{n}")
def limits(request: pytest.FixtureRequest) -> EngineLimits:
    return replace(LIMITS, lookahead=request.param)


def test_greedy_equals_generate(oracle: Oracle, planned: Plan, loaded: LoadedModel, limits: EngineLimits) -> None:
    engine = Engine(loaded, planned, limits)
    check(oracle, run(engine, requests_of(oracle, 1)))
    check(oracle, run(engine, requests_of(oracle, 7)))
    check(oracle, run(engine, requests_of(oracle, 32), per_step=3))
    engine.close()


def test_prefix_hits_change_nothing(oracle: Oracle, planned: Plan, loaded: LoadedModel, limits: EngineLimits) -> None:
    engine = Engine(loaded, planned, limits)
    run(engine, requests_of(oracle, 32))
    again = run(engine, requests_of(oracle, 32, "again"))
    check(oracle, again, "again")
    cached = {name: sum(chunk.cached_tokens for chunk in chunks) for name, chunks in again.items()}
    assert cached == {f"again{i}": (len(p) - 1) // 4 * 4 for i, p in enumerate(oracle.prompts)}
    engine.close()


def test_chunked_prefill_changes_nothing(
    oracle: Oracle, planned: Plan, loaded: LoadedModel, limits: EngineLimits
) -> None:
    cut = replace(limits, max_batch_tokens=13, prefill_chunk_tokens=5, prefix_cache=False)
    engine = Engine(loaded, planned, cut)
    check(oracle, run(engine, requests_of(oracle, 32), per_step=5))
    engine.close()


def test_preemption_changes_nothing(oracle: Oracle, planned: Plan, loaded: LoadedModel, limits: EngineLimits) -> None:
    scarce = replace(planned, num_blocks=34, max_context=128)
    engine = Engine(loaded, scarce, limits)
    check(oracle, run(engine, requests_of(oracle, 32)))
    assert engine.scheduler.preemptions > 0
    engine.close()


def test_ends_and_aborts_in_the_middle_change_nothing(
    oracle: Oracle, planned: Plan, loaded: LoadedModel, limits: EngineLimits
) -> None:
    """With lookahead a step of the ended is in flight, over blocks that others take next."""
    scarce = replace(planned, num_blocks=60, max_context=128)
    engine = Engine(loaded, scarce, limits)
    waiting = [
        replace(request, sampling=replace(request.sampling, end_ids=(oracle.outputs[i][3 + i % 8],)))
        for i, request in enumerate(requests_of(oracle, 32))
    ]
    outputs: dict[str, tuple[int, ...]] = defaultdict(tuple)
    while waiting or engine.has_work():
        if waiting:
            engine.submit(waiting.pop(0))
        for chunk in engine.step():
            outputs[chunk.request_id] += chunk.token_ids
        for request_id in [name for name, ids in outputs.items() if len(ids) == 3 and int(name[1:]) % 5 == 0]:
            engine.abort(request_id)
        engine.check_integrity()
    assert engine.blocks.held_blocks == 0
    for i, whole in enumerate(oracle.outputs):
        end = whole.index(whole[3 + i % 8]) + 1
        assert outputs[f"r{i}"] == whole[: min(end, 3) if i % 5 == 0 else end], f"r{i}"
    engine.close()
