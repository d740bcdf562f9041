"""The attention contract on the torch backend, on the CPU."""

from __future__ import annotations

import pytest
import torch

from deployments.engine.attention_torch import TorchAttention
from tests.contract.attention_cases import CASES, Bounds, Layer, left_over, shared_prefix

CPU = torch.device("cpu")


def make(bounds: Bounds) -> TorchAttention:
    return TorchAttention(bounds.num_blocks, bounds.device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_equals_plain_attention(case: str, dtype: torch.dtype) -> None:
    CASES[case].check(make, CPU, dtype)


def test_what_another_request_left_does_not_spread() -> None:
    left_over(make, CPU, torch.float32, Layer())


def test_sequences_share_their_first_blocks() -> None:
    shared_prefix(make, CPU, torch.float32)
