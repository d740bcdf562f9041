"""How many tokens to promise a request: its prompt and what requests lately produced. Integers only."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import deque

from deployments.routing.policy import Size


class Lengths:
    """The last lengths of one sort of request, sorted too. A number is added in O(window), a rank read in O(1)."""

    def __init__(self, window: int) -> None:
        self._window = window
        self._recent: deque[int] = deque()
        self._sorted: list[int] = []

    def __len__(self) -> int:
        return len(self._sorted)

    def add(self, tokens: int) -> None:
        """Remember one, and forget the oldest when there are too many."""
        if len(self._recent) == self._window:
            del self._sorted[bisect_left(self._sorted, self._recent.popleft())]
        self._recent.append(tokens)
        insort(self._sorted, tokens)

    def quantile(self, percent: int, *, above: int = -1) -> int | None:
        """The quantile by nearest rank of those over `above`; None when there is none."""
        start = bisect_right(self._sorted, above)
        count = len(self._sorted) - start
        return self._sorted[start + max(1, -(-count * percent // 100)) - 1] if count else None


class Caution:
    """Which quantile of the output lengths to promise, learnt from preemptions, for which one in TARGET is aimed at.

    Requests that share a replica don't all grow to their ends at once, and what one leaves unused another may take. How
    much less than all of it suffices depends on the lengths and on how many requests share, so it isn't set but found:
    a preemption raises the quantile by STEP; a request that ended while others waited for room lowers it by STEP /
    TARGET. While nobody waits a smaller promise would let nobody in, and nothing is learnt. Away from its bounds the
    quantile can only stand still at one preemption in TARGET such requests, however their lengths are distributed: the
    rule of adaptive conformal inference (Gibbs and Candès, NeurIPS 2021).

    Args:
        percent: the quantile to begin with.
    """

    TARGET = 1000
    STEP = 25_000
    """Thousandths of a percent."""
    LEAST, MOST = 10_000, 95_000

    def __init__(self, percent: int = 50) -> None:
        self._thousandths = 1000 * percent

    @property
    def percent(self) -> int:
        """The quantile, rounded down."""
        return self._thousandths // 1000

    def learn(self, *, preempted: int, held_back: int) -> None:
        """Take in what happened: preemptions, and requests that ended while others waited."""
        moved = self._thousandths + self.STEP * preempted - self.STEP // self.TARGET * held_back
        self._thousandths = min(self.MOST, max(self.LEAST, moved))


class OutputLengths:
    """A running quantile of the output lengths of a model's last finished requests.

    Learnt per model and not per pool: a request is sized before its pool is chosen, and the pool with the longer
    context gets the longer requests because of it. Requests that allow similar outputs, up to a factor of two in
    `max_tokens`, are learnt from together once enough of them are known, for two reasons: a low limit cuts outputs off,
    which says nothing about requests without it; and limits go with uses.

    Args:
        prior_tokens: the answer until `enough` lengths are known.
        enough: lengths needed before they are believed.
        window: lengths remembered, the latest ones.
        quantile_percent: the quantile to begin with; 50 means that every other request ends within what it was
            promised.
    """

    def __init__(
        self, *, prior_tokens: int = 256, enough: int = 32, window: int = 256, quantile_percent: int = 50
    ) -> None:
        self.caution = Caution(quantile_percent)
        self._prior_tokens = prior_tokens
        self._enough = enough
        self._window = window
        self._all = Lengths(window)
        self._alike: dict[int, Lengths] = {}
        """Bit length of max_tokens -> lengths."""

    def add(self, output_tokens: int, max_tokens: int) -> None:
        """Learn from one finished request."""
        self._all.add(output_tokens)
        self._alike.setdefault(max_tokens.bit_length(), Lengths(self._window)).add(output_tokens)

    def expected(self, max_tokens: int | None = None) -> int:
        """Tokens: the quantile by nearest rank, at least 1; of all requests, or of those with such a limit."""
        known = self._known(max_tokens)
        quantile = known.quantile(self.caution.percent) if known is not None else None
        return max(1, quantile) if quantile is not None else self._prior_tokens

    def expected_beyond(self, produced: int, max_tokens: int) -> int:
        """Output of a request that has produced so many tokens and goes on: the quantile of those that got further.

        Where none did, it is expected to produce what a request does once more.
        """
        known = self._known(max_tokens)
        further = known.quantile(self.caution.percent, above=produced) if known is not None else None
        return min(max_tokens, further if further is not None else produced + self.expected(max_tokens))

    def size(self, prompt_tokens: int, max_tokens: int) -> Size:
        """The size of a request that asks for at most `max_tokens` of output."""
        return Size(prompt_tokens, max_tokens, prompt_tokens + min(max_tokens, self.expected(max_tokens)))

    def _known(self, max_tokens: int | None) -> Lengths | None:
        """What to go by: the lengths of such requests, those of all, or nothing yet."""
        alike = self._alike.get(max_tokens.bit_length()) if max_tokens is not None else None
        for lengths in (alike, self._all):
            if lengths is not None and len(lengths) >= self._enough:
                return lengths
        return None


class ReleaseRate:
    """Tokens of KV cache that became free per second, over the last whole seconds. Forecasts `Retry-After`."""

    WINDOW_S = 15
    LONGEST_S = 600

    def __init__(self) -> None:
        self._seconds: deque[tuple[int, int]] = deque()
        """(second, tokens freed in it), oldest first."""
        self._sum = 0

    def add(self, tokens: int, now: float) -> None:
        """Count `tokens` as freed at `now`."""
        second = int(now)
        if self._seconds and self._seconds[-1][0] >= second:
            last, freed = self._seconds[-1]
            self._seconds[-1] = (last, freed + tokens)
        else:
            self._seconds.append((second, tokens))
        self._sum += tokens
        self._forget(now)

    def wait_ms(self, tokens: int, now: float) -> int:
        """Milliseconds until `tokens` more should be free, at most 600 s; the window when nothing was freed."""
        self._forget(now)
        if tokens <= 0:
            return 0
        if self._sum == 0:
            return 1000 * self.WINDOW_S
        span = max(1, int(now) - self._seconds[0][0] + 1)
        return min(1000 * self.LONGEST_S, -(-1000 * tokens * span // self._sum))

    def _forget(self, now: float) -> None:
        while self._seconds and self._seconds[0][0] <= int(now) - self.WINDOW_S:
            self._sum -= self._seconds.popleft()[1]
