"""The same logits and parameters draw the same ids on every device, alone or in a batch."""

from __future__ import annotations

import pytest
import torch

from tests.contract.sampling_cases import CASES, EXPECTED, ROWS, VOCAB, logits
from tests.unit.engine.drawing import draw_requests

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_ids_are_those_written_down(name: str, device: str) -> None:
    assert draw_requests(logits(ROWS, VOCAB).to(device), CASES[name]).ids.tolist() == EXPECTED[name]


@pytest.mark.parametrize("device", DEVICES)
def test_batch_mates_change_nothing(device: str) -> None:
    """All cases in one step, which is more than one group of rows."""
    together = [request for requests in CASES.values() for request in requests]
    got = draw_requests(logits(ROWS, VOCAB).repeat(len(CASES), 1).to(device), together).ids.tolist()
    assert got == [token for name in CASES for token in EXPECTED[name]]


def test_every_case_is_its_own() -> None:
    assert len({tuple(ids) for ids in EXPECTED.values()}) == len(CASES)
