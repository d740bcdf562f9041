"""The number of replicas that demand asks for: enough, not too many, and it stays where it is."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from deployments.routing.autoscaling import desired_replicas

tokens = st.integers(0, 10**7)


@given(
    target=st.integers(0, 50),
    running=st.integers(0, 50),
    held=tokens,
    waiting=tokens,
    replica=st.integers(1, 10**6),
    percent=st.integers(1, 100),
    data=st.data(),
)
def test_enough_not_too_many_and_stable(
    target: int, running: int, held: int, waiting: int, replica: int, percent: int, data: st.DataObject
) -> None:
    slack = data.draw(st.integers(0, percent - 1))

    def desired(target: int, held: int = held) -> int:
        return desired_replicas(
            target=target,
            running=running,
            held_tokens=held,
            waiting_tokens=waiting,
            replica_tokens=replica,
            target_percent=percent,
            slack_percent=slack,
        )

    number, demand = desired(target), held + waiting
    assert 100 * demand <= number * replica * percent, "the demand is over the target"
    assert number > running or not waiting
    if number != target:
        fewer = number - 1
        bound = percent if number > target else percent - slack
        assert 100 * demand > fewer * replica * bound or (waiting and number == running + 1), "one less would do"
    assert desired(number) == number, "asked again, it answers the same"
    assert desired(target, held + data.draw(tokens)) >= number, "more demand never asks for fewer"
