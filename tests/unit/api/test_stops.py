"""Stop strings across pieces, against a search of the whole text."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.api.stops import StopMatcher

letters = st.text("ab", min_size=1, max_size=5)


def run(stops: list[str], parts: list[str]) -> tuple[str, bool]:
    matcher, shown = StopMatcher(stops), ""
    for part in parts:
        text, hit = matcher.push(part)
        shown += text
        if hit:
            return shown, True
    return shown + matcher.flush(), False


def reference(stops: list[str], text: str) -> tuple[str, bool]:
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


@given(st.lists(letters, min_size=1, max_size=4), st.lists(st.text("abc", max_size=6), max_size=10))
@settings(max_examples=500, deadline=None)
def test_equals_a_search_of_the_whole_text(stops: list[str], parts: list[str]) -> None:
    assert run(stops, parts) == reference(stops, "".join(parts))


@given(st.lists(letters, min_size=1, max_size=4), st.lists(st.text("abc", max_size=6), max_size=10))
@settings(max_examples=300, deadline=None)
def test_holds_back_only_what_could_become_a_stop(stops: list[str], parts: list[str]) -> None:
    matcher, shown, text = StopMatcher(stops), "", ""
    for part in parts:
        fresh, hit = matcher.push(part)
        shown, text = shown + fresh, text + part
        if hit:
            return
        held = text[len(shown) :]
        assert text.startswith(shown)
        assert not held or any(stop.startswith(held) for stop in stops)


@pytest.mark.parametrize(
    ("stops", "parts", "expected"),
    [
        (["\n\n"], ["one\n", "\ntwo"], ("one", True)),
        (["STOP"], ["a ST", "OOP STO", "P x"], ("a STOOP ", True)),
        (["aab"], ["aaa", "ab"], ("aa", True)),
        (["b", "abc"], ["abc"], ("a", True)),
        (["bc", "abc"], ["abc"], ("", True)),
        (["END"], ["the EN"], ("the EN", False)),
    ],
)
def test_cases(stops: list[str], parts: list[str], expected: tuple[str, bool]) -> None:
    assert run(stops, parts) == expected


def test_a_long_stop_string_costs_no_more_per_character() -> None:
    matcher = StopMatcher(["a" * 100_000 + "b"])
    started = time.perf_counter()
    for _ in range(2000):
        matcher.push("a" * 5)
    assert time.perf_counter() - started < 2.0


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopMatcher([""])
