"""int8 weights: bitsandbytes' bytes, made where the weight is."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes
import pytest
import torch
import transformers
from torch import nn
from transformers.integrations.bitsandbytes import Bnb8bitQuantize

from deployments.engine import eight_bit
from deployments.engine.eight_bit import int8_parameter, quantising_in_place
from tests.unit.engine.tiny import llama, save


def weight(n: int = 48, k: int = 64, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(n)).to(dtype)


def theirs(of: torch.Tensor) -> Any:
    return bitsandbytes.nn.Int8Params(of.clone(), requires_grad=False, has_fp16_weights=False).to("cpu")


@pytest.mark.parametrize("part_elements", [1, 5 * 64, 2**24], ids=["row by row", "an odd number of rows", "whole"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_bytes_are_bitsandbytes_own(
    dtype: torch.dtype, part_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eight_bit, "PART_ELEMENTS", part_elements)
    mine, expected = int8_parameter(weight(dtype=dtype)), theirs(weight(dtype=dtype))
    assert type(mine) is type(expected)
    assert mine.dtype == torch.int8
    assert torch.equal(mine.data, expected.data)
    assert torch.equal(mine.SCB, expected.SCB)
    assert mine.SCB.dtype == torch.float32
    assert mine.CB.data_ptr() == mine.data_ptr(), "one copy under two names"


def test_no_more_than_a_part_is_there_in_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    own = eight_bit.functional.int8_vectorwise_quant
    monkeypatch.setattr(eight_bit, "PART_ELEMENTS", 1000)
    monkeypatch.setattr(
        eight_bit.functional, "int8_vectorwise_quant", lambda half: (seen.append(half.numel()), own(half))[1]
    )
    int8_parameter(weight())
    assert max(seen) <= 1000
    assert sum(seen) == 48 * 64


def read(folder: Path) -> dict[str, torch.Tensor]:
    config = transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map={"": "cpu"}, quantization_config=config
    )
    return dict(model.state_dict())


def test_a_checkpoint_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    folder = save(tmp_path, llama())
    expected = read(folder)
    own = Bnb8bitQuantize.convert
    with quantising_in_place():
        assert Bnb8bitQuantize.convert is not own
        found = read(folder)
    assert Bnb8bitQuantize.convert is own
    assert found.keys() == expected.keys()
    assert sum(tensor.dtype == torch.int8 for tensor in found.values()) > 10
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_was_transposed_is_turned() -> None:
    """GPT-2's linears store [in, out]."""
    model = nn.Module()
    model.linear = nn.Module()
    model.linear.source_cls = transformers.Conv1D
    stored = weight(64, 48).T
    operation: Any = SimpleNamespace()
    done = eight_bit._convert(operation, {"linear.weight": [stored]}, model=model)
    assert torch.equal(done["linear.weight"].data, theirs(stored.T).data)
