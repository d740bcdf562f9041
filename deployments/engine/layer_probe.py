"""The probe layer by layer: rounding told from a fault, whatever the model's depth.

Two right ways of computing in 16 bits drift apart from layer to layer, and how far depends on the model, so a bound on
the logits that finds faults refuses deep models that are right. A fault is one of a layer. So each layer is followed by
what it made in the plain forward instead of what it makes here, the next one starts from that, and what each one makes
is compared: what one layer rounds does not depend on how many there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deployments.engine.stages import Stage, find_decoder, find_layers

_ROUNDINGS = 4
"""Of a hidden state in a layer: with attention and with the MLP added, here and in the plain forward."""


class Uncomparable(Exception):
    """The layers pass what can't be told apart by token; `str()` says what, as the end of a sentence."""


@dataclass(frozen=True)
class Passed:
    """What a layer was given and what it made of it in the plain forward of one sequence or several: each
    [tokens, hidden] on the CPU, in the dtype that it had."""

    given: Tensor
    made: Tensor

    @classmethod
    def joined(cls, parts: Sequence[Passed]) -> Passed:
        """Of several sequences, one behind the other."""
        return cls(torch.cat([part.given for part in parts]), torch.cat([part.made for part in parts]))


@dataclass(frozen=True)
class ByLayer:
    """How far off each part of a model is by itself."""

    layers: tuple[float, ...]
    """RMS(made here - made there) / RMS(added there), less what the sum of both may round to; of the forward in which
    it is largest, so that a fault of few rows is not lost among all."""
    head: float
    """Relative RMS error of the logits."""

    def worst(self) -> tuple[str, float]:
        """The part that is furthest off, and by how much."""
        index, most = max(enumerate(self.layers), key=lambda each: each[1])
        return (f"what layer {index} adds", most) if most >= self.head else ("what the head makes", self.head)


def relative_rms(found: Tensor, wanted: Tensor) -> float:
    """RMS(found - wanted) / RMS(wanted); infinite where either is not a number."""
    return _ratio(float((found - wanted).pow(2).sum()), float(wanted.pow(2).sum()))


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """The layers in the order in which they run: those of an encoder-decoder's encoder first."""
    stacks = [find_decoder(model)[1]]
    if model.config.is_encoder_decoder:
        stacks.insert(0, model.get_encoder())
    return [layer for stack in stacks for layer in find_layers(stack)[1]]


@contextmanager
def recording(layers: Sequence[nn.Module]) -> Iterator[list[Passed]]:
    """Fills the list with what each call of a layer in a forward of one sequence is given and makes."""
    passed: list[Passed] = []

    def keep(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any], result: Any) -> None:
        given, made = args[0] if args else named.get("hidden_states"), _hidden(result)
        if isinstance(given, Tensor) and isinstance(made, Tensor):
            passed.append(Passed(given[0].cpu(), made[0].cpu()))

    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_hook(keep, with_kwargs=True).remove)
        yield passed


def check_passed(passed: Sequence[Passed], tokens: Sequence[int]) -> None:
    """Refuse what `recording` kept where it isn't one state for each token.

    Args:
        tokens: of each layer's forward.

    Raises:
        Uncomparable: it isn't.
    """
    if len(passed) != len(tokens):
        raise Uncomparable(f"its {len(tokens)} layers, which pass hidden states {len(passed)} times, can't be compared")
    for index, (each, count) in enumerate(zip(passed, tokens, strict=True)):
        if each.made.dim() != 2 or each.given.shape != each.made.shape or len(each.made) != count:
            given, made = list(each.given.shape), list(each.made.shape)
            raise Uncomparable(f"layer {index}, which makes {made} of {given} for {count} tokens, can't be compared")


class Places:
    """Which tokens of one sequence the rows are that the layers of a stage work on."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self._stages = stages
        self._rows = self._done = 0
        self._now = torch.empty(0, dtype=torch.int64)

    @contextmanager
    def followed(self) -> Iterator[None]:
        """While the stages run steps, each begun by `begin`."""
        for stage in self._stages:
            stage.on_forward = self._follow
        try:
            yield
        finally:
            for stage in self._stages:
                stage.on_forward = None

    def begin(self, rows: int) -> None:
        """A step of so many rows comes, through all stages."""
        self._rows, self._done = rows, 0

    def where(self, _layer: int) -> Tensor:
        """Of the forward that runs: see `forced`."""
        return self._now

    def _follow(self, positions: Tensor) -> None:
        """A forward begins. A stage's forwards have a step's rows between them, and behind the last one padding."""
        self._now = positions.flatten().cpu().clone()
        left = self._rows - self._done
        self._now[left:] = -1
        self._done = (self._done + min(left, len(self._now))) % self._rows


@contextmanager
def forced(
    layers: Sequence[nn.Module], passed: Sequence[Passed], where: Callable[[int], Tensor]
) -> Iterator[Callable[[], tuple[float, ...]]]:
    """While `layers` run, what each one hands on is what the plain forward's made.

    Args:
        passed: by each layer.
        where: tells, for the call that a layer is in, which of the tokens in `passed` its rows are: int64 [B * n], -1
            for padding.

    Yields:
        What gives each layer's error so far, as in `ByLayer.layers`.
    """
    watched = [_Watched(index, each, where) for index, each in enumerate(passed)]
    with ExitStack() as hooks:
        for layer, each in zip(layers, watched, strict=True):
            hooks.callback(layer.register_forward_hook(each).remove)
        yield lambda: tuple(each.error for each in watched)


class _Watched:
    """The hook of one layer; `error` is that of its worst call."""

    def __init__(self, index: int, passed: Passed, where: Callable[[int], Tensor]) -> None:
        self._index, self._passed, self._where = index, passed, where
        self.error = 0.0

    def __call__(self, _: nn.Module, _args: tuple[Any, ...], result: Any) -> Any:
        made = self._compared(_hidden(result))
        return (made, *result[1:]) if isinstance(result, tuple) else made

    def _compared(self, made: Tensor) -> Tensor:
        """What is handed on in place of `made`, [B, n, hidden]."""
        rows = self._where(self._index)
        kept = rows >= 0
        given, wanted = self._passed.given[rows[kept]], self._passed.made[rows[kept]]
        states = made.cpu().flatten(0, 1)
        off = (states[kept].double() - wanted.double()).abs()
        over = float((off - _rounding(given, wanted)).clamp(min=0).pow(2).sum())
        added = float((wanted.double() - given.double()).pow(2).sum())
        self.error = max(self.error, _ratio(over, added))
        states = states.clone()
        states[kept] = wanted.to(made.dtype)
        return states.view(made.shape).to(made.device)


def _rounding(given: Tensor, made: Tensor) -> Tensor:
    """float64, of each element: what its sums may be apart if all that is added is the same. Each is rounded by half an
    epsilon at most, and is not part of what a layer adds, which is small beside some elements."""
    eps = torch.finfo(made.dtype).eps
    return _ROUNDINGS * eps / 2 * torch.maximum(given.abs(), made.abs()).double()


def _ratio(off: float, whole: float) -> float:
    """The root of a quotient of sums of squares."""
    if off == 0:
        return 0.0
    return math.sqrt(off / whole) if off < math.inf and whole > 0 else math.inf


def _hidden(result: Any) -> Any:
    return result[0] if isinstance(result, tuple) else result
