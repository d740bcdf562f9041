"""Chunks on their way to a reader, against a clock of the test's."""

from __future__ import annotations

from deployments.engine.outbox import CHUNKS_PER_S, Outbox, interval_s
from deployments.protocol import TokenChunk


def chunk(*tokens: int, end: bool = False) -> TokenChunk:
    return TokenChunk("a", tokens, finish_reason="stop" if end else None)


async def test_the_first_goes_at_once_and_the_next_when_it_is_due() -> None:
    box = Outbox()
    assert box.put(chunk(1), 5.0, 0.03)
    assert not box.put(chunk(2), 5.01, 0.03)
    assert not box.put(chunk(3), 5.02, 0.03)
    assert (await box.get()).token_ids == (1,)
    assert not box.release(5.029, 0.03)
    assert box.due == 5.03
    assert box.release(5.03, 0.03)
    assert (await box.get()).token_ids == (2, 3)
    assert box.release(5.04, 0.03), "nothing is held"


async def test_slow_tokens_are_never_held() -> None:
    box = Outbox()
    for i in range(3):
        assert box.put(chunk(i), 5.0 + 0.04 * i, 0.03)
        assert (await box.get()).token_ids == (i,)


async def test_the_end_takes_with_it_what_was_held() -> None:
    box = Outbox()
    box.put(chunk(1), 5.0, 0.03)
    await box.get()
    assert not box.put(chunk(2), 5.001, 0.03)
    assert box.put(chunk(3, end=True), 5.002, 0.03)
    last = await box.get()
    assert (last.token_ids, last.finish_reason) == ((2, 3), "stop")


async def test_a_reader_that_fell_behind_gets_all_up_to_the_end() -> None:
    box = Outbox()
    for i in range(4):
        box.put(chunk(i, end=i == 3), float(i), 0.03)
    assert await box.get() == chunk(0, 1, 2, 3, end=True)


def test_all_streams_together_have_the_rate() -> None:
    assert 64 / interval_s(64) == CHUNKS_PER_S
    assert interval_s(1) < 0.001, "one stream's tokens go one by one"
