"""An engine whose GPU fails in the middle of its steps: its requests end, its replica is told, its blocks are back.

The same with a CPU's faults: tests/contract/test_engine_failures.py.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from deployments.engine.messages import EngineSpec
from deployments.settings import PoolSettings
from tests.failures import faulty

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> EngineSpec:
    folder = tmp_path_factory.mktemp("models") / "llama"
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 1024}
    config = transformers.LlamaConfig(
        **sizes, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    pool = PoolSettings(
        device="cuda", quantization="nf4", dtype="bfloat16", max_memory={0: "4GiB"}, max_sequences=16,
        max_batch_tokens=256, tune_kernels=False,
    )  # fmt: skip
    return EngineSpec("tiny", folder, pool, replicas_here=1, cache_dir=folder.parent / "quantized")


def test_logits_that_are_not_finite_and_then_a_kernel_that_fails(
    spec: EngineSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail() -> None:
        async with faulty(spec, tmp_path, monkeypatch) as engine:
            await engine.survives_nan()
            await engine.ends("assert", "CUDA error")

    asyncio.run(fail())


def test_memory_that_ran_out(spec: EngineSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail() -> None:
        async with faulty(spec, tmp_path, monkeypatch) as engine:
            await engine.ends("memory", "out of memory")

    asyncio.run(fail())
