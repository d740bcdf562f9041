"""What accelerate's hooks leave behind."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from types import MethodType
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn

from deployments.engine.hooks import remove_hooks


@pytest.fixture
def no_cycles_collected() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


def hooked() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for module in model.modules():
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    return model


@pytest.mark.usefixtures("no_cycles_collected")
def test_a_linear_without_its_hook_goes_with_its_last_reference() -> None:
    model = hooked()
    expected = model(torch.ones(1, 4))
    remove_hooks(model)
    assert torch.equal(model(torch.ones(1, 4)), expected)
    assert not any("forward" in vars(module) or hasattr(module, "_hf_hook") for module in model.modules())
    linear = weakref.ref(model[0])
    model.set_submodule("0", nn.Identity())
    assert linear() is None


def test_a_forward_that_is_an_instances_own_stays() -> None:
    def doubled(linear: nn.Linear, x: Tensor) -> Tensor:
        return 2 * nn.Linear.forward(linear, x)

    linear: Any = nn.Linear(4, 4)
    expected = 2 * linear(torch.ones(1, 4))
    linear.forward = MethodType(doubled, linear)
    model = nn.Sequential(linear)
    add_hook_to_module(linear, AlignDevicesHook(execution_device="cpu"))
    remove_hooks(model)
    assert torch.equal(model(torch.ones(1, 4)), expected)
