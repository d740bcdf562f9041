"""Stop strings: end a text at the first of them, and hold back no more than could still become one."""

from __future__ import annotations

from collections.abc import Sequence


class _Automaton:
    """Knuth-Morris-Pratt matcher of one stop string; `matched` is the length of the prefix that the text ends with."""

    __slots__ = ("_failure", "_pattern", "matched")

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._failure = [0] * len(pattern)
        self.matched = 0
        for i in range(1, len(pattern)):
            self._step(pattern[i])
            self._failure[i] = self.matched
        self.matched = 0

    def _step(self, char: str) -> None:
        while self.matched and (self.matched == len(self._pattern) or self._pattern[self.matched] != char):
            self.matched = self._failure[self.matched - 1]
        if self._pattern[self.matched] == char:
            self.matched += 1

    def advance(self, char: str) -> int:
        """Length of the stop string if `char` completes it, else 0."""
        self._step(char)
        return len(self._pattern) if self.matched == len(self._pattern) else 0


class StopMatcher:
    """Cuts a text, given piece by piece, where the first stop string completes.

    The stop string that ends earliest wins, and the longest of those that end together; so the result depends on
    the text alone, not on how it was split. Costs O(1) per character and stop string, amortised.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise ValueError("a stop string must not be empty")
        self._automata = [_Automaton(stop) for stop in stops]
        self._first_chars = frozenset(stop[0] for stop in stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Add `text`; return what may be shown now, and whether a stop string was completed.

        After a hit the shown text ends before the stop string, and the matcher must not be used again.
        """
        if not self._held and self._first_chars.isdisjoint(text):
            return text, False
        known = self._held + text
        for end, char in enumerate(text, start=len(self._held) + 1):
            longest = max(automaton.advance(char) for automaton in self._automata)
            if longest:
                self._held = ""
                return known[: end - longest], True
        shown = len(known) - max(automaton.matched for automaton in self._automata)
        self._held = known[shown:]
        return known[:shown], False

    def flush(self) -> str:
        """What was held back: the text has ended without a stop string."""
        held, self._held = self._held, ""
        return held
