"""accelerate's hooks, which copy a forward's arguments from device to device: gone once a model has its stages."""

from __future__ import annotations

from types import MethodType
from typing import Any

from accelerate.hooks import remove_hook_from_submodules
from torch import nn


def remove_hooks(model: nn.Module) -> None:
    """Remove accelerate's hooks, and the reference to itself that each leaves in its module.

    A hook puts back the `forward` that it found, as an attribute of the module, which so refers to itself: a linear
    that is replaced then stays until Python collects cycles, and with all of them a second copy of the model.
    """
    remove_hook_from_submodules(model)
    for module in model.modules():
        instance: Any = module
        kind: Any = type(module)
        if vars(module).get("forward") == MethodType(kind.forward, module):  # another one is this instance's own
            del instance.forward
