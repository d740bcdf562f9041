"""An engine that fails in the middle of its steps, in its own process; on GPUs: tests/gpu/test_failures_gpu.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from deployments.engine.messages import EngineSpec
from deployments.settings import PoolSettings
from tests.failures import faulty
from tests.unit.engine.tiny import llama, save


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> EngineSpec:
    folder = save(tmp_path_factory.mktemp("models") / "llama", llama(max_position_embeddings=4096))
    pool = PoolSettings(
        device="cpu", dtype="float32", cpu_device_memory="40MB", block_size=4, threads=1, max_sequences=16
    )
    return EngineSpec("tiny", folder, pool, replicas_here=1, cache_dir=folder.parent / "quantized")


async def test_logits_that_are_not_finite_and_then_memory_that_ran_out(
    spec: EngineSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with faulty(spec, tmp_path, monkeypatch) as engine:
        await engine.survives_nan()
        await engine.ends("memory", "can't allocate memory")
