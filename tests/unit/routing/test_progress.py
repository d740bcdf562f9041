from __future__ import annotations

from deployments.protocol import GenerationRequest, Sampling, TokenChunk
from deployments.routing.progress import Progress

REQUEST = GenerationRequest("q", (1, 2, 3), Sampling(max_tokens=9, seed=0), salt="s")


def test_the_first_attempt_is_the_request_itself() -> None:
    assert Progress(REQUEST).next_attempt() == REQUEST


def test_each_later_attempt_has_an_id_of_its_own_and_what_came_so_far() -> None:
    progress = Progress(REQUEST)
    progress.next_attempt()
    progress.note(TokenChunk("q", (4, 5)), "p")
    second = progress.next_attempt()
    progress.note(TokenChunk("q~1", (6,)), "p")
    third = progress.next_attempt()
    assert (second.request_id, second.prompt_ids, second.resumed_tokens) == ("q~1", (1, 2, 3, 4, 5), 2)
    assert (third.request_id, third.prompt_ids, third.resumed_tokens) == ("q~2", (1, 2, 3, 4, 5, 6), 3)
    assert {second.prompt_tokens, third.prompt_tokens} == {3}
    assert {(attempt.sampling, attempt.salt) for attempt in (second, third)} == {(REQUEST.sampling, "s")}


def test_the_client_sees_one_request() -> None:
    progress = Progress(REQUEST)
    chunk = TokenChunk("q~3", (4,), finish_reason="length", cached_tokens=2)
    assert progress.note(chunk, "p") == TokenChunk("q", (4,), finish_reason="length", cached_tokens=2)


def test_it_is_bound_to_a_pool_by_its_first_token() -> None:
    progress = Progress(REQUEST)
    progress.note(TokenChunk("q"), "p")
    assert progress.pool is None
    progress.note(TokenChunk("q", (4,)), "p")
    assert progress.pool == "p"
