"""How many tokens to promise a request: its prompt and what requests lately produced. Integers only."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque

from deployments.routing.policy import Size


class OutputLengths:
    """A running quantile of the output lengths of a model's last finished requests.

    Args:
        prior_tokens: the answer until `enough` lengths are known.
        enough: lengths needed before they are believed.
        window: lengths remembered, the latest ones.
        quantile_percent: 80 means that four of five requests end within what they were promised.
    """

    def __init__(
        self, *, prior_tokens: int = 256, enough: int = 32, window: int = 256, quantile_percent: int = 80
    ) -> None:
        self._prior_tokens = prior_tokens
        self._enough = enough
        self._window = window
        self._quantile_percent = quantile_percent
        self._recent: deque[int] = deque()
        self._sorted: list[int] = []

    def add(self, output_tokens: int) -> None:
        """Learn from one finished request."""
        if len(self._recent) == self._window:
            del self._sorted[bisect_left(self._sorted, self._recent.popleft())]
        self._recent.append(output_tokens)
        insort(self._sorted, output_tokens)

    def expected(self) -> int:
        """Tokens: the quantile by nearest rank, at least 1."""
        count = len(self._sorted)
        if count < self._enough:
            return self._prior_tokens
        rank = -(-count * self._quantile_percent // 100)
        return max(1, self._sorted[max(rank, 1) - 1])

    def size(self, prompt_tokens: int, max_tokens: int) -> Size:
        """The size of a request that asks for at most `max_tokens` of output."""
        return Size(prompt_tokens, max_tokens, prompt_tokens + min(max_tokens, self.expected()))


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

    def wait_for(self, tokens: int, now: float) -> int:
        """Whole seconds until `tokens` more are expected to be free: 1 to 600; the window when nothing was freed."""
        self._forget(now)
        if tokens <= 0:
            return 1
        if self._sum == 0:
            return self.WINDOW_S
        span = max(1, int(now) - self._seconds[0][0] + 1)
        return min(self.LONGEST_S, max(1, -(-tokens * span // self._sum)))

    def _forget(self, now: float) -> None:
        while self._seconds and self._seconds[0][0] <= int(now) - self.WINDOW_S:
            self._sum -= self._seconds.popleft()[1]
