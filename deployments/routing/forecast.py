"""How long a request will wait, and how wrong that was. Integers only.

The forecast is the tokens to be granted before it, and its own, less what is free, over the rate at which tokens became
free lately. Each request that queues is told a forecast to itself; when it is granted, its wait is held against it.
"""

from __future__ import annotations

from dataclasses import dataclass

from deployments.routing.sizing import ReleaseRate


@dataclass(frozen=True, slots=True)
class ForecastError:
    """Over all requests that waited and were granted: sums of what was forecast for them, and of what came."""

    requests: int = 0
    forecast_ms: int = 0
    waited_ms: int = 0
    error_ms: int = 0
    """Of the absolute differences."""

    @property
    def percent(self) -> int:
        """The absolute differences in percent of the waits."""
        return 100 * self.error_ms // max(1, self.waited_ms)


class Forecast:
    """The forecast of one ledger."""

    def __init__(self) -> None:
        self._rate = ReleaseRate()
        self.error = ForecastError()
        """Of all requests so far."""

    def freed(self, tokens: int, now: float) -> None:
        """So many tokens became free."""
        if tokens > 0:
            self._rate.add(tokens, now)

    def wait_ms(self, tokens: int, now: float) -> int:
        """Milliseconds until so many tokens more are free."""
        return self._rate.wait_ms(tokens, now)

    def retry_after_s(self, tokens: int, now: float) -> int:
        """The same in whole seconds, at least 1: for the Retry-After header."""
        return max(1, -(-self.wait_ms(tokens, now) // 1000))

    def granted(self, forecast_ms: int, waited_ms: int) -> None:
        """A request that waited was granted."""
        old = self.error
        self.error = ForecastError(
            requests=old.requests + 1,
            forecast_ms=old.forecast_ms + forecast_ms,
            waited_ms=old.waited_ms + waited_ms,
            error_ms=old.error_ms + abs(forecast_ms - waited_ms),
        )
