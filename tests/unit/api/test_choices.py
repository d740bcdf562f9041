"""One choice's text, counts and log-probabilities, chunk by chunk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.api.choices import ChoiceText, Piece
from deployments.api.detokenizer import Vocabulary
from deployments.errors import EngineFailed
from deployments.protocol import Sampling, TokenChunk
from tests.fakes.dispatcher import chunks_of
from tests.unit.api.conftest import byte_level_backend

BACKEND = byte_level_backend()
VOCABULARY = Vocabulary(BACKEND)
END_ID = BACKEND.token_to_id("<|end|>")


def choice(stop: Sequence[str] = (), **sampling: Any) -> ChoiceText:
    options = {"max_tokens": 100, "seed": 1, "end_ids": (END_ID,), **sampling}
    return ChoiceText(VOCABULARY.detokenizer(), stop, Sampling(**options))


def ids(text: str) -> list[int]:
    return list(BACKEND.encode(text, add_special_tokens=False).ids)


def feed(made: ChoiceText, chunks: Sequence[TokenChunk]) -> list[Piece]:
    pieces = []
    for chunk in chunks:
        pieces.append(made.feed(chunk))
        if pieces[-1].finish_reason:
            break
    return pieces


def text_of(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


@pytest.mark.parametrize("per_chunk", [1, 3, 100])
def test_the_end_token_counts_but_is_not_shown(per_chunk: int) -> None:
    made = choice()
    pieces = feed(made, chunks_of([*ids("abc"), END_ID], per_chunk=per_chunk, cached_tokens=16))
    assert (text_of(pieces), pieces[-1].finish_reason) == ("abc", "stop")
    assert (made.output_tokens, made.cached_tokens) == (4, 16)


def test_an_end_token_that_is_not_special_is_not_shown_either() -> None:
    made = choice(end_ids=(ids("z")[0],))
    assert text_of(feed(made, chunks_of(ids("abz")))) == "ab"


def test_without_end_ids_the_end_token_is_only_skipped_text() -> None:
    made = choice(end_ids=())
    pieces = feed(made, chunks_of([*ids("a"), END_ID, *ids("b")], finish="length"))
    assert (text_of(pieces), made.output_tokens) == ("ab", 3)


def test_length_flushes_an_incomplete_character() -> None:
    pieces = feed(choice(), chunks_of(ids("a€")[:-1], finish="length"))
    assert (text_of(pieces), pieces[-1].finish_reason) == ("a\ufffd", "length")


@pytest.mark.parametrize("per_chunk", [1, 2, 100])
def test_a_stop_string_ends_text_tokens_and_choice(per_chunk: int) -> None:
    made = choice(["cd"])
    pieces = feed(made, chunks_of(ids("abcdef"), finish="length", per_chunk=per_chunk))
    assert (text_of(pieces), pieces[-1].finish_reason, made.output_tokens) == ("ab", "stop", 4)


def test_what_could_be_a_stop_is_shown_when_the_text_ends() -> None:
    pieces = feed(choice(["cde"]), chunks_of([*ids("abcd"), END_ID]))
    assert [piece.text for piece in pieces] == ["a", "b", "", "", "cd"]


def test_a_stop_string_in_the_flushed_tail() -> None:
    pieces = feed(choice(["\ufffd"]), chunks_of(ids("a€")[:-1], finish="length"))
    assert (text_of(pieces), pieces[-1].finish_reason) == ("a", "stop")


def test_min_tokens_holds_stop_strings_off() -> None:
    pieces = feed(choice(["b"], min_tokens=3), chunks_of(ids("abcabc"), finish="length"))
    assert text_of(pieces) == "abca"


def test_logprobs_follow_the_text() -> None:
    pieces = feed(choice(logprobs=2), chunks_of([*ids("a€"), END_ID], logprobs=True))
    placed = [one for piece in pieces for one in piece.logprobs]
    assert [one.offset for one in placed] == [0, 1, 1, 1]
    assert END_ID not in [one.token.token_id for one in placed]


def test_logprobs_of_cut_text_are_left_out() -> None:
    pieces = feed(choice(["cd"], logprobs=0), chunks_of(ids("abcdef"), finish="length", logprobs=True))
    assert [one.token.token_id for piece in pieces for one in piece.logprobs] == ids("ab")


def test_logprobs_wait_with_held_text() -> None:
    pieces = feed(choice(["cde"], logprobs=0), chunks_of(ids("abcd"), finish="length", logprobs=True))
    assert [len(piece.logprobs) for piece in pieces] == [1, 1, 0, 2]


@pytest.mark.parametrize("reason", ["error", "abort"])
def test_a_failure_is_raised(reason: Any) -> None:
    with pytest.raises(EngineFailed, match="GPU on fire" if reason == "error" else "aborted"):
        choice().feed(TokenChunk("r", finish_reason=reason, error="GPU on fire" if reason == "error" else None))


@given(st.text("abcde €", max_size=30), st.lists(st.text("abc€", min_size=1, max_size=3), max_size=3), st.data())
@settings(max_examples=300, deadline=None)
def test_chunking_changes_nothing(text: str, stop: list[str], data: st.DataObject) -> None:
    """Text, tokens, log-probabilities and reason are the same however the tokens are chunked."""
    results = []
    for per_chunk in (1, data.draw(st.integers(2, 7))):
        made = choice(stop, logprobs=1)
        chunks = chunks_of(ids(text), finish="length", per_chunk=per_chunk, logprobs=True)
        pieces = feed(made, chunks)
        placed = [one for piece in pieces for one in piece.logprobs]
        results.append((text_of(pieces), placed, pieces[-1].finish_reason, made.output_tokens))
    assert results[0] == results[1]
    assert not any(s in results[0][0] for s in stop)
