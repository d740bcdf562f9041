"""How much each key may ask for: requests a minute, tokens a minute, requests at once. Integers only.

Each rate is a bucket that a minute's worth fits in, refilled evenly: over any t minutes at most t + 1 times the limit
is let through. A request pays one of the request bucket when it comes in, and its prompt's tokens when they are known;
its output is paid at its end, when its length is known. So a request is let in while a single token is left, and what
it used beyond that is a debt, which those after it wait for: none is ever too long for its limit, and over time no key
gets more than it. Prompts that no replica took up are given back.

An ingress replica counts alone. Of r replicas each allows the r-th part, rounded up, so that all of them together
allow no more than the limit and r - 1, however the requests are spread.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from deployments.api.keys import ApiKey
from deployments.errors import KeyLimitExceeded

MINUTE_NS = 60 * 10**9


class Bucket:
    """Tokens that come in evenly; the level may be below zero. A new one is full.

    Args:
        per_minute: what comes in, and what fits in.
        now: nanoseconds, of a clock that only grows.
    """

    __slots__ = ("_at", "_level", "per_minute")

    def __init__(self, per_minute: int, now: int) -> None:
        self.per_minute = per_minute
        self._level = per_minute * MINUTE_NS
        """In tokens times `MINUTE_NS`: what comes in during one nanosecond is then `per_minute`, whole."""
        self._at = now

    def take(self, tokens: int, now: int) -> None:
        """Take tokens out, or with a negative number put some back."""
        self._refill(now)
        self._level = min(self._level - tokens * MINUTE_NS, self.per_minute * MINUTE_NS)

    def wait(self, now: int) -> int:
        """Nanoseconds until there is one token."""
        self._refill(now)
        return max(0, -(-(MINUTE_NS - self._level) // self.per_minute))

    def _refill(self, now: int) -> None:
        self._level = min(self._level + (now - self._at) * self.per_minute, self.per_minute * MINUTE_NS)
        self._at = now


class _Account:
    """What one key has used."""

    __slots__ = ("requests", "running", "tokens")

    def __init__(self) -> None:
        self.requests: Bucket | None = None
        self.tokens: Bucket | None = None
        self.running = 0


class Admission:
    """A request that was let in, until it leaves."""

    __slots__ = ("_account", "_clock", "_paid")

    def __init__(self, account: _Account, clock: Callable[[], int]) -> None:
        self._account = account
        self._clock = clock
        self._paid = 0

    def pay(self, tokens: int) -> None:
        """The request is known to use so many tokens in all; call it again when more, or less, is known."""
        if self._account.tokens is not None:
            self._account.tokens.take(tokens - self._paid, self._clock())
        self._paid = tokens

    def leave(self, tokens: int) -> None:
        """The request has ended and used so many tokens in all. Call it once."""
        self.pay(tokens)
        self._account.running -= 1


class Limiter:
    """Counts the requests of each key at one ingress replica.

    Args:
        replicas: how many ingress replicas share the limits.
        clock: nanoseconds that only grow.
    """

    def __init__(self, replicas: int = 1, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._replicas = replicas
        self._clock = clock
        self._accounts: dict[str, _Account] = {}

    def enter(self, key: ApiKey) -> Admission:
        """Let a request in.

        Raises:
            KeyLimitExceeded: one of the key's limits is reached; says which, and when to come again.
        """
        now = self._clock()
        account = self._accounts.setdefault(key.name, _Account())
        account.requests = self._bucket(account.requests, key.requests_per_minute, now)
        account.tokens = self._bucket(account.tokens, key.tokens_per_minute, now)
        if key.concurrent_requests is not None and account.running >= self._share(key.concurrent_requests):
            raise _refusal(key, "concurrent_requests", key.concurrent_requests, 10**9)
        for field, bucket in (("requests_per_minute", account.requests), ("tokens_per_minute", account.tokens)):
            if bucket is not None and (wait := bucket.wait(now)) > 0:
                raise _refusal(key, field, getattr(key, field), wait)
        if account.requests is not None:
            account.requests.take(1, now)
        account.running += 1
        return Admission(account, self._clock)

    def _share(self, limit: int) -> int:
        return -(-limit // self._replicas)

    def _bucket(self, known: Bucket | None, limit: int | None, now: int) -> Bucket | None:
        """The bucket as it is, or a new one where the key file has another limit now."""
        if limit is None:
            return None
        share = self._share(limit)
        return known if known is not None and known.per_minute == share else Bucket(share, now)


def _refusal(key: ApiKey, field: str, limit: int, wait_ns: int) -> KeyLimitExceeded:
    seconds = -(-wait_ns // 10**9)
    return KeyLimitExceeded(
        f"{field} of the key {key.name!r} is {limit:,}, and is reached: come again in {seconds} s, or have it raised "
        "in the server's key file",
        retry_after_s=seconds,
    )
