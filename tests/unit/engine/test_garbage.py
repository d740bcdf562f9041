"""What a process that steps does about garbage."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from deployments.engine.garbage import settle_garbage


@pytest.fixture(autouse=True)
def settled() -> Iterator[None]:
    threshold = gc.get_threshold()
    settle_garbage()
    yield
    gc.unfreeze()
    gc.set_threshold(*threshold)


@pytest.fixture
def searches() -> Iterator[list[str]]:
    """One for each search that began."""
    began: list[str] = []

    def note(phase: str, _: Any) -> None:
        began.append(phase)

    gc.callbacks.append(note)
    yield began
    gc.callbacks.remove(note)


class Cycle:
    def __init__(self) -> None:
        self.me = self


def test_what_a_few_steps_make_starts_no_search(searches: list[str]) -> None:
    made = [(object(),) for _ in range(6 * 1500)]
    assert len(made) == 9000
    assert not searches


def test_what_was_there_is_not_looked_through() -> None:
    assert gc.get_freeze_count() > 1000


def test_cycles_are_found_in_the_end() -> None:
    cycle = Cycle()
    gone = weakref.ref(cycle)
    del cycle
    made = [(object(),) for _ in range(50_000)]
    assert gone() is None, len(made)
