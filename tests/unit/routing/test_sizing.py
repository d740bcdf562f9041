from __future__ import annotations

import pytest

from deployments.routing.sizing import OutputLengths, ReleaseRate


def test_the_prior_holds_until_enough_is_known() -> None:
    lengths = OutputLengths()
    for _ in range(31):
        lengths.add(5)
    assert lengths.expected() == 256
    lengths.add(5)
    assert lengths.expected() == 5


def test_the_quantile_is_by_nearest_rank() -> None:
    lengths = OutputLengths(enough=1, quantile_percent=80)
    for value in (50, 10, 40, 20, 30):
        lengths.add(value)
    assert lengths.expected() == 40  # the 4th of 5


def test_old_lengths_are_forgotten() -> None:
    lengths = OutputLengths(enough=1, window=4)
    for value in (900, 900, 900, 900, 7, 7, 7, 7):
        lengths.add(value)
    assert lengths.expected() == 7


def test_a_request_is_never_promised_more_than_it_asked_for() -> None:
    lengths = OutputLengths()
    assert lengths.size(100, 20).grant_tokens == 120
    assert lengths.size(100, 1000).grant_tokens == 356


def test_at_least_one_token_is_expected() -> None:
    lengths = OutputLengths(enough=1)
    lengths.add(0)
    assert lengths.expected() == 1


@pytest.mark.parametrize(
    ("freed", "tokens", "seconds"),
    [
        ([], 100, 15),  # nothing to go by
        ([(0.0, 100), (1.0, 100)], 300, 3),  # 100 a second
        ([(0.0, 100), (1.0, 100)], 301, 4),
        ([(0.0, 100)], 0, 1),
        ([(0.0, 1)], 10**9, 600),
    ],
)
def test_the_wait_follows_the_rate(freed: list[tuple[float, int]], tokens: int, seconds: int) -> None:
    rate = ReleaseRate()
    for at, count in freed:
        rate.add(count, at)
    assert rate.wait_for(tokens, freed[-1][0] if freed else 0.0) == seconds


def test_the_rate_forgets() -> None:
    rate = ReleaseRate()
    rate.add(1000, 0.0)
    rate.add(10, 20.0)
    assert rate.wait_for(100, 20.0) == 10
    assert rate.wait_for(100, 40.0) == ReleaseRate.WINDOW_S
