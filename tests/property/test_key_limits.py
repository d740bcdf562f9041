"""A bucket against the promise it makes: at most t + 1 times the limit in t minutes, and no token lost."""

from __future__ import annotations

from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from deployments.api.limits import MINUTE_NS, Bucket

steps = st.lists(st.tuples(st.integers(0, 3 * MINUTE_NS), st.integers(1, 500)), min_size=1, max_size=40)


@given(per_minute=st.integers(1, 10**6), steps=steps)
def test_what_is_let_through(per_minute: int, steps: list[tuple[int, int]]) -> None:
    """Against exact fractions; a request is let in while a token is left, and then takes what it takes."""
    now, taken, level = 17, 0, Fraction(per_minute)
    bucket = Bucket(per_minute, now)
    for pause, tokens in steps:
        now += pause
        level = min(level + Fraction(pause * per_minute, MINUTE_NS), Fraction(per_minute))
        wait = bucket.wait(now)
        assert (wait == 0) == (level >= 1)
        if wait:
            assert bucket.wait(now + wait - 1) > 0
            assert Bucket.wait(bucket, now + wait) == 0
            level = min(level + Fraction(wait * per_minute, MINUTE_NS), Fraction(per_minute))
            now += wait
        assert taken <= per_minute * (1 + Fraction(now - 17, MINUTE_NS)) - 1
        bucket.take(tokens, now)
        level -= tokens
        taken += tokens
