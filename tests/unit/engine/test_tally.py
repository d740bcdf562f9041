"""Counts over an engine's reports."""

from __future__ import annotations

import pytest
import torch

from deployments.engine.memory_watch import MemoryWatch
from deployments.engine.messages import Measured, StepReport
from deployments.engine.tally import EngineTally
from deployments.protocol import GenerationRequest, Sampling, TokenChunk


def test_counts_tokens_and_steps() -> None:
    tally = EngineTally()
    tally.submitted(GenerationRequest("a", (1, 2, 3), Sampling(max_tokens=4, seed=1)))
    first = Measured(0.004, held_blocks=2, running=1, waiting=3, busy_s=(0.004,))
    tally.reported(StepReport((TokenChunk("a", (7,), cached_tokens=2),), (("a", 2),), 0, 0, measured=first))
    tally.reported(StepReport((TokenChunk("a", (8, 9), finish_reason="length"),), (), 0, 0, measured=Measured(0.02)))
    assert (tally.prompt_tokens, tally.cached_tokens, tally.output_tokens) == (3, 2, 3)
    assert sum(tally.steps.buckets().counts) == 2
    assert tally.steps.buckets().total == 0.024
    assert tally.last == Measured(0.02)


def test_a_report_without_a_step_is_no_step() -> None:
    tally = EngineTally()
    tally.reported(StepReport((TokenChunk("a", finish_reason="error", error="too long"),), (), 0, 0))
    assert sum(tally.steps.buckets().counts) == 0


def test_gpus_are_asked_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []
    now = [0.0]

    def info(device: torch.device) -> tuple[int, int]:
        asked.append(device)
        return 30, 100

    monkeypatch.setattr(torch.cuda, "mem_get_info", info)
    watch = MemoryWatch([torch.device("cuda", 0), torch.device("cuda", 1)], clock=lambda: now[0])
    assert watch.taken() == watch.taken() == (70, 70)
    assert len(asked) == 2
    now[0] = 5.0
    assert watch.taken() == (70, 70)
    assert len(asked) == 4
    assert MemoryWatch([torch.device("cpu")], clock=lambda: now[0]).taken() == ()
