"""A tiny random Llama on disk, its plan on virtual devices, and an engine run to its end."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from deployments.engine.attention import RowSpan
from deployments.engine.loop import Engine
from deployments.engine.messages import EngineLimits
from deployments.engine.stages import StepRows
from deployments.protocol import GenerationRequest, Sampling, TokenChunk
from placement.footprint import footprint
from placement.hardware import virtual_cpu_devices
from placement.plan import Plan, solve

VOCAB = 256
POISON = 77
"""A token whose embedding is NaN, as if an outlier had overflowed; not among those that the loader's probe feeds."""
IDS = [(37 * i + 5) % VOCAB for i in range(23)]
LIMITS = EngineLimits(max_batch_tokens=64, max_sequences=16, prefix_cache=True, threads=1)


def llama(layers: int = 2, **options: Any) -> LlamaConfig:
    """Small enough to run in milliseconds, wide enough for bitsandbytes' CPU kernels."""
    small = {
        "hidden_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "vocab_size": VOCAB,
        "max_position_embeddings": 128,
        "initializer_range": 0.1,
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**(small | options))


def save(folder: Path, config: PreTrainedConfig, *, seed: int = 11, poisoned: bool = False) -> Path:
    """A random model in float32."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    if poisoned:
        with torch.no_grad():
            model.get_input_embeddings().weight[POISON] = float("nan")
    model.save_pretrained(folder)
    return folder


def plan_of(
    folder: Path,
    *,
    stages: int = 1,
    quantization: str = "nf4",
    memory: str = "8MB",
    dtype: str | None = "float32",
    **options: Any,
) -> Plan:
    """The plan of a replica of `stages` virtual devices."""
    wishes = {"block_size": 4, "max_batch_tokens": 64, "max_sequences": 16} | options
    return solve(
        footprint(folder, quantization=quantization, dtype=dtype), virtual_cpu_devices((memory,) * stages), **wishes
    )


def rows(parts: list[tuple[int, int, tuple[int, ...]]], sampled: tuple[int, ...]) -> StepRows:
    """A step over parts (start, end, block table) of copies of IDS."""
    positions = tuple(p for start, end, _ in parts for p in range(start, end))
    spans = tuple(RowSpan(start, end - start, table) for start, end, table in parts)
    return StepRows(tuple(IDS[p] for p in positions), positions, spans, sampled)


def request(
    name: str, prompt: Iterable[int] = (3, 1, 4, 1, 5), *, salt: str = "", **sampling: Any
) -> GenerationRequest:
    """Greedy, 8 tokens, unless told otherwise."""
    wanted = {"max_tokens": 8, "seed": 1, "temperature": 0.0} | sampling
    return GenerationRequest(name, tuple(prompt), Sampling(**wanted), salt=salt)


def drain(engine: Engine) -> dict[str, list[TokenChunk]]:
    """Step until nothing is left to do; every request's chunks. Checks that no block stays behind."""
    chunks: dict[str, list[TokenChunk]] = defaultdict(list)
    while engine.has_work():
        for chunk in engine.step():
            chunks[chunk.request_id].append(chunk)
        engine.check_integrity()
    for request_id, mine in chunks.items():
        assert [c.finish_reason is not None for c in mine] == [False] * (len(mine) - 1) + [True], request_id
    assert engine.blocks.held_blocks == 0
    return chunks


def ids(chunks: Iterable[TokenChunk]) -> tuple[int, ...]:
    """All token ids of some chunks."""
    return tuple(token for chunk in chunks for token in chunk.token_ids)


def generate(engine: Engine, *requests: GenerationRequest) -> dict[str, list[TokenChunk]]:
    """Submit together, and run to the end."""
    for each in requests:
        engine.submit(each)
    return drain(engine)
