"""Work beside a block ends with it."""

from __future__ import annotations

from threading import Event

import pytest

from deployments.engine.background import beside


def test_the_block_runs_beside_the_work_and_waits_for_its_end() -> None:
    began, done = Event(), []

    def work(ended: Event) -> None:
        began.set()
        done.append(ended.wait(60))

    with beside(work):
        assert began.wait(60)
        assert done == []
    assert done == [True]


def test_a_block_that_fails_ends_the_work_too() -> None:
    done = []
    with pytest.raises(RuntimeError, match="the load's own"), beside(lambda ended: done.append(ended.wait(60))):
        raise RuntimeError("the load's own")
    assert done == [True]
