"""How far a load is, said every few seconds and once at its end."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from threading import Event

import pytest
import torch

from deployments.engine import load_progress
from deployments.engine.load_progress import EVERY_S, log_progress, logging_progress
from tests.unit.engine.tiny import llama, plan_of, save


class Load(Event):
    """Ends after so many waits, none of which takes time."""

    def __init__(self, waits: int) -> None:
        super().__init__()
        self.left = waits
        self.waited: list[float | None] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.waited.append(timeout)
        self.left -= 1
        return self.left < 0


@pytest.fixture(autouse=True)
def shown(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, load_progress.__name__)


def test_a_line_every_few_seconds_and_one_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    held, load = iter((0, 2_900_000_000, 5_700_000_000)), Load(2)
    log_progress(5_700_000_000, lambda: next(held), load)
    assert caplog.messages == [
        "loading weights: 0 B of 5.70 GB (0 %)",
        "loading weights: 2.90 GB of 5.70 GB (50 %)",
        "loading weights: 5.70 GB of 5.70 GB (100 %)",
    ]
    assert load.waited == [EVERY_S] * 3


@pytest.mark.parametrize(("held", "line"), [(1_200, "1.00 kB of 1.00 kB (100 %)"), (-5, "0 B of 1.00 kB (0 %)")])
def test_never_more_than_planned_nor_less_than_nothing(held: int, line: str, caplog: pytest.LogCaptureFixture) -> None:
    log_progress(1_000, lambda: held, Load(0))
    assert caplog.messages == [f"loading weights: {line}"]


def test_what_all_gpus_of_the_plan_hold_beyond_what_they_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plan = plan_of(save(tmp_path, llama()), stages=2)
    plan = replace(plan, stages=tuple(replace(s, device=i + 2, weight_bytes=4_000) for i, s in enumerate(plan.stages)))
    held = {2: 700, 3: 0}
    monkeypatch.setattr(torch.cuda, "memory_allocated", held.__getitem__)
    with logging_progress(plan):
        held.update({2: 4_700, 3: 2_000})
    assert caplog.messages[-1] == "loading weights: 6.00 kB of 8.00 kB (75 %)"


def test_nothing_is_held_before_cuda_is_used() -> None:
    if torch.cuda.is_initialized():
        pytest.skip("CUDA is in use here")
    assert torch.cuda.memory_allocated(0) == 0
