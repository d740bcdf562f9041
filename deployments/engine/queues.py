"""Where the scheduler's sequences are: those that wait, and those that run in each slot, all in order of arrival."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from itertools import chain
from operator import attrgetter

from deployments.engine.sequence import TokenSequence

by_arrival = attrgetter("arrival")
"""Key of the one priority there is: who came first."""


class Queues:
    """Keeps each sequence in one queue, and its `state` and `slot` in step with it.

    Args:
        slots: micro-batches that the pipeline holds at once.
    """

    def __init__(self, slots: int) -> None:
        self.waiting: list[TokenSequence] = []
        self.slots: list[list[TokenSequence]] = [[] for _ in range(slots)]
        self._prompts: list[TokenSequence] = []
        """What `prompts` returned last, and who has entered a slot since."""

    def running(self) -> Iterator[TokenSequence]:
        """Those of all slots, slot by slot."""
        return chain.from_iterable(self.slots)

    def prompts(self) -> list[TokenSequence]:
        """Those that run and have drawn no token. Kept from call to call: they are few among many."""
        self._prompts = [s for s in self._prompts if s.state == "running" and not s.decodes]
        return self._prompts

    def youngest(self) -> TokenSequence:
        """Of those that run."""
        return max(self.running(), key=by_arrival)

    def wait(self, sequence: TokenSequence) -> None:
        """Queue one whose state is "waiting": a new one, or one that was set back."""
        insort(self.waiting, sequence, key=by_arrival)

    def enter(self, slot: int) -> None:
        """The head of those that wait runs in a slot."""
        sequence = self.waiting.pop(0)
        sequence.state, sequence.slot = "running", slot
        insort(self.slots[slot], sequence, key=by_arrival)
        insort(self._prompts, sequence, key=by_arrival)

    def leave(self, sequence: TokenSequence) -> None:
        """Out of the queue where it waits, or of the slot where it runs."""
        if sequence.state == "waiting":
            self.waiting.remove(sequence)
            return
        assert sequence.slot is not None, f"{sequence.request_id} runs in no slot"
        self.slots[sequence.slot].remove(sequence)
        sequence.slot = None

    def checks(self) -> dict[str, bool]:
        """For each thing that could be wrong, whether all is well."""
        return {
            "a queue is not in order of arrival": all(
                queue == sorted(queue, key=by_arrival) for queue in (self.waiting, *self.slots)
            ),
            "a prompt that runs was forgotten": all(s.decodes or s in self._prompts for s in self.running()),
            "a waiting sequence has a slot": all(s.state == "waiting" and s.slot is None for s in self.waiting),
            "a sequence is in another slot than it says": all(
                s.state == "running" and s.slot == slot for slot, running in enumerate(self.slots) for s in running
            ),
        }
