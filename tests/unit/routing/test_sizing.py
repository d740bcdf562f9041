from __future__ import annotations

import pytest

from deployments.routing.sizing import Caution, OutputLengths, ReleaseRate


def test_the_prior_holds_until_enough_is_known() -> None:
    lengths = OutputLengths()
    for _ in range(31):
        lengths.add(5, 100)
    assert lengths.expected() == 256
    lengths.add(5, 100)
    assert lengths.expected() == 5


def test_the_quantile_is_by_nearest_rank() -> None:
    lengths = OutputLengths(enough=1, quantile_percent=80)
    for value in (50, 10, 40, 20, 30):
        lengths.add(value, 1000)
    assert lengths.expected() == 40  # the 4th of 5


def test_old_lengths_are_forgotten() -> None:
    lengths = OutputLengths(enough=1, window=4)
    for value in (900, 900, 900, 900, 7, 7, 7, 7):
        lengths.add(value, 1000)
    assert lengths.expected() == 7


def test_a_request_is_never_promised_more_than_it_asked_for() -> None:
    lengths = OutputLengths()
    assert lengths.size(100, 20).grant_tokens == 120
    assert lengths.size(100, 1000).grant_tokens == 356


def test_at_least_one_token_is_expected() -> None:
    lengths = OutputLengths(enough=1)
    lengths.add(0, 10)
    assert lengths.expected() == 1


def test_requests_with_similar_limits_are_learnt_from_together_once_enough_are_known() -> None:
    lengths = OutputLengths(enough=3, quantile_percent=80)
    for _ in range(30):
        lengths.add(16, 16)  # cut off
    lengths.add(700, 1000)
    lengths.add(500, 900)
    assert lengths.expected(1000) == 16
    lengths.add(600, 800)
    assert lengths.expected(1000) == 700
    assert lengths.expected(31) == 16
    assert lengths.expected(64) == 16  # none of that sort: those of all
    assert lengths.size(100, 1000).grant_tokens == 800


@pytest.mark.parametrize(
    ("produced", "max_tokens", "expected"),
    [
        (0, 1000, 40),  # the 4th of 5
        (10, 1000, 50),  # of 20, 30, 40, 50
        (45, 1000, 50),
        (45, 48, 48),
        (50, 1000, 90),  # none got further: what is usual once more
        (50, 60, 60),
    ],
)
def test_what_goes_on_is_expected_to_do_as_those_that_got_as_far(produced: int, max_tokens: int, expected: int) -> None:
    lengths = OutputLengths(enough=5, quantile_percent=80)
    for value in (10, 20, 30, 40, 50):
        lengths.add(value, 1000)
    assert lengths.expected_beyond(produced, max_tokens) == expected


def test_without_anything_learnt_what_goes_on_is_expected_to_produce_the_prior_once_more() -> None:
    assert OutputLengths().expected_beyond(300, 1000) == 556


def test_a_preemption_is_worth_a_thousand_requests_that_were_held_back() -> None:
    caution = Caution(50)
    caution.learn(preempted=1, held_back=0)
    assert caution.percent == 75
    for _ in range(10):
        caution.learn(preempted=0, held_back=100)
    assert caution.percent == 50


def test_nothing_is_learnt_while_nobody_is_held_back() -> None:
    caution = Caution(50)
    caution.learn(preempted=0, held_back=0)
    assert caution.percent == 50


def test_caution_has_bounds_and_returns_from_them_at_once() -> None:
    caution = Caution(50)
    caution.learn(preempted=100, held_back=0)
    assert caution.percent == 95
    caution.learn(preempted=0, held_back=1)
    assert caution.percent == 94
    caution.learn(preempted=0, held_back=100_000)
    assert caution.percent == 10
    caution.learn(preempted=1, held_back=0)
    assert caution.percent == 35


def test_what_is_promised_follows_caution() -> None:
    lengths = OutputLengths(enough=5, quantile_percent=50)
    for value in (10, 20, 30, 40, 50):
        lengths.add(value, 1000)
    assert lengths.size(100, 1000).grant_tokens == 130
    lengths.caution.learn(preempted=1, held_back=0)
    assert lengths.size(100, 1000).grant_tokens == 140
    assert lengths.expected_beyond(10, 1000) == 40


@pytest.mark.parametrize(
    ("freed", "tokens", "milliseconds"),
    [
        ([], 100, 15_000),  # nothing to go by
        ([(0.0, 100), (1.0, 100)], 300, 3_000),  # 100 a second
        ([(0.0, 100), (1.0, 100)], 301, 3_010),
        ([(0.0, 100)], 0, 0),
        ([(0.0, 100)], -5, 0),
        ([(0.0, 1)], 10**9, 600_000),
    ],
)
def test_the_wait_follows_the_rate(freed: list[tuple[float, int]], tokens: int, milliseconds: int) -> None:
    rate = ReleaseRate()
    for at, count in freed:
        rate.add(count, at)
    assert rate.wait_ms(tokens, freed[-1][0] if freed else 0.0) == milliseconds


def test_the_rate_forgets() -> None:
    rate = ReleaseRate()
    rate.add(1000, 0.0)
    rate.add(10, 20.0)
    assert rate.wait_ms(100, 20.0) == 10_000
    assert rate.wait_ms(100, 40.0) == 1000 * ReleaseRate.WINDOW_S
