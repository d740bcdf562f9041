"""Rotary frequencies that don't depend on what else is in a step.

transformers' "dynamic" and "longrope" choose their frequencies anew in each forward, by its largest position: one long
sequence would turn the keys of all others in its step. Up to the length that the model was first made for, which is the
longest that a plan allows, both stay at those that they begin with; so these are kept for good. It matters even
there: a step that is launched ahead may compute one position more.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def fix_frequencies(model: nn.Module) -> None:
    """Let `model`'s rotary embeddings keep the frequencies that they were made with, in place."""
    for module in model.modules():
        rotary: Any = module
        kind = getattr(module, "rope_type", None)
        if isinstance(kind, str):
            rotary.rope_type = _fixed(kind)
        elif isinstance(kind, dict):  # by type of layer
            rotary.rope_type = {layers: _fixed(each) for layers, each in kind.items()}


def _fixed(kind: str) -> str:
    return "default" if kind == "longrope" or "dynamic" in kind else kind
