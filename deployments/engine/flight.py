"""What a step on GPUs draws: it stays on the last one for the slot's next step, and the host reads it one step late."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deployments.engine.draw import Draw
from deployments.engine.link import Link
from deployments.engine.sampler import Drawn, Sampler
from deployments.engine.sampling import SampledToken


@dataclass(frozen=True, slots=True)
class Flight:
    """A step on its way through the GPUs."""

    drawn: Drawn | None
    """None: the step samples nothing."""
    done: torch.cuda.Event | None
    """Where it ends; None for what is drawn on a CPU."""

    def result(self) -> list[SampledToken]:
        """What was drawn, one per sampled row; waits for it."""
        if self.drawn is not None:
            return self.drawn.read()
        if self.done is not None:
            self.done.synchronize()
        return []


class Draws:
    """Draws each slot's steps, and has at hand what the slot's last one drew.

    Args:
        sampler: on the last stage's device.
        returns: from there to the stage that reads the ids of the step before; None: that is the last stage itself.
        slots: micro-batches in flight.
    """

    def __init__(self, sampler: Sampler, returns: Link | None, *, slots: int) -> None:
        self._sampler = sampler
        self._returns = returns
        self._last_ids: list[Tensor | None] = [None] * slots

    def last_ids(self, slot: int) -> Tensor | None:
        """What the slot's last step drew: int64 [sampled rows], on the last stage's device; None before the first."""
        return self._last_ids[slot]

    def launch(self, slot: int, logits: Tensor | None, draw: Draw) -> Flight:
        """Queue the end of a step on the last stage's device, which must be the current one.

        Args:
            logits: [sampled rows, vocab]; None: the step samples nothing.
        """
        if logits is None:
            done = torch.cuda.Event()
            done.record()
            return Flight(None, done)
        return self._send(slot, self._sampler.draw(logits, draw))

    def launch_found(self, slot: int, found: Tensor) -> Flight:
        """The same as `launch`, where a graph has drawn already: `found` as `Sampler.take` has it."""
        return self._send(slot, self._sampler.take(found))

    def _send(self, slot: int, drawn: Drawn) -> Flight:
        self._last_ids[slot] = drawn.ids
        if self._returns is not None:
            self._returns.send(slot, drawn.ids)
        return Flight(drawn, drawn.ready)
