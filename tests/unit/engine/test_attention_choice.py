"""Which attention backend is chosen, and what is said of it."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deployments.engine import attention_choice
from deployments.engine.attention_choice import Choice, choose
from deployments.engine.attention_flashinfer import FlashInferAttention, Limits
from deployments.engine.attention_torch import TorchAttention
from deployments.engine.flashinfer_fit import Kind
from deployments.engine.messages import EngineLimits
from tests.fakes.kernels import FakeKernels

CPU, GPU = torch.device("cpu"), torch.device("meta")
"""Any device but the CPU is asked for kernels; memory on the meta device costs nothing."""
KIND = Kind(8, 2, 128, torch.bfloat16, torch.bfloat16, None, None)
LIMITS = EngineLimits(max_batch_tokens=64, max_sequences=16, prefix_cache=True, threads=1)
PLAN: Any = SimpleNamespace(block_size=16, num_blocks=40, max_context=128)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """What the machine lacks; nothing."""
    lacks: dict[str, str | None] = {"reason": None}
    monkeypatch.setattr(attention_choice, "why_not_here", lambda: lacks["reason"])
    monkeypatch.setattr(attention_choice, "FlashInferKernels", lambda _: FakeKernels())
    return lacks


def named(choice: Choice, kind: type) -> str:
    assert {type(backend) for backend in choice.backends} == {kind}
    return choice.shown


def test_torch_on_the_cpu_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    choice = choose(PLAN, [KIND], [CPU, CPU], None)
    assert named(choice, TorchAttention) == "torch"
    assert len(choice.backends) == 2
    assert not caplog.records


@pytest.mark.usefixtures("machine")
def test_flashinfer_on_gpus_that_share_its_pool(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    choice = choose(PLAN, [KIND, replace(KIND, window=9)], [GPU, GPU], LIMITS)
    assert named(choice, FlashInferAttention) == "flashinfer"
    first, second = choice.backends
    assert isinstance(first, FlashInferAttention)
    assert isinstance(second, FlashInferAttention)
    assert first._pool is second._pool
    assert first._limits == Limits(max_sequences=16, max_rows=64, max_blocks_per_sequence=9, splits=256)
    assert [record.getMessage() for record in caplog.records] == [
        "compiled 128",
        "compiled 128",
        "attention runs on FlashInfer",
    ], "progress of the first stage alone: the others find all loaded"


def test_torch_where_flashinfer_does_not_fit_with_the_reason(
    machine: dict[str, str | None], caplog: pytest.LogCaptureFixture
) -> None:
    reason = "it has kernels for bfloat16 KV with heads of 64, 128, 256, not of 80"
    choice = choose(PLAN, [KIND, replace(KIND, head_dim=80)], [GPU], LIMITS)
    assert named(choice, TorchAttention) == f"torch ({reason})"
    machine["reason"] = "GPU 0 is older than Ampere"
    assert named(choose(PLAN, [replace(KIND, head_dim=80)], [GPU], LIMITS), TorchAttention) == (
        "torch (GPU 0 is older than Ampere)"
    ), "where a plan counts on no FlashInfer, blocks are not made for it"
    assert "not known" in named(choose(PLAN, [KIND], [GPU], None), TorchAttention)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 3
    assert caplog.records[0].getMessage().endswith(f"FlashInfer is not used, as {reason}")
