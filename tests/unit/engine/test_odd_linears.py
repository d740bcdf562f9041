"""Linears with an odd number of outputs do not run bitsandbytes' product."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn
from torch.nn import functional

from deployments.engine.hooks import remove_hooks
from deployments.engine.odd_linears import mend_odd_linears


def quantised(outputs: int, *, nested: bool = False, bias: bool = True, kind: str = "nf4") -> Any:
    torch.manual_seed(0)
    linear: Any = bnb.nn.Linear4bit(64, outputs, bias, torch.bfloat16, compress_statistics=nested, quant_type=kind)
    return linear.to("cpu")


def refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("bitsandbytes' product was called")


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_an_odd_linear_multiplies_by_its_dequantised_weight(
    nested: bool, bias: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = quantised(5, nested=nested, bias=bias, kind=kind)
    x = torch.randn(9, 64)
    weight = bnb.functional.dequantize_4bit(odd.weight.data, odd.weight.quant_state).bfloat16()
    expected = functional.linear(x.bfloat16(), weight, odd.bias.bfloat16() if bias else None).float()
    monkeypatch.setattr(bnb, "matmul_4bit", refuse)
    with pytest.raises(AssertionError, match="was called"):
        odd(x)
    assert mend_odd_linears(nn.Sequential(odd)) == 1
    found = odd(x)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_even_linears_and_others_stay_as_they_are() -> None:
    model = nn.Sequential(quantised(6), nn.Linear(64, 5), bnb.nn.Linear8bitLt(64, 5, has_fp16_weights=False))
    assert mend_odd_linears(model) == 0
    assert not any("forward" in vars(module) for module in model)


def test_a_hook_stays_and_goes_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    odd = quantised(5)
    monkeypatch.setattr(bnb, "matmul_4bit", refuse)
    add_hook_to_module(odd, AlignDevicesHook(execution_device="cpu"))
    hooked = odd.forward
    mend_odd_linears(odd)
    assert odd.forward is hooked
    with_hook = odd(torch.ones(3, 64))
    remove_hooks(odd)
    assert not hasattr(odd, "_old_forward")
    assert torch.equal(odd(torch.ones(3, 64)), with_hook)
