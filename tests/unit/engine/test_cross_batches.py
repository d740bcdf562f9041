"""A step of an encoder-decoder as batches: every row once, padding within what is planned for."""

from __future__ import annotations

from itertools import accumulate

from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.engine.attention import RowSpan
from deployments.engine.cross_batches import decoder_batches, encoder_batches

BLOCK = 4
ALL = 10**6


def fresh(encoded: int, decoded: int, first_block: int = 0) -> RowSpan:
    total = encoded + decoded
    return RowSpan(0, total, tuple(range(first_block, first_block + -(-total // BLOCK))), encoded)


def going_on(encoded: int, past: int, first_block: int = 0) -> RowSpan:
    total = encoded + past + 1
    return RowSpan(total - 1, 1, tuple(range(first_block, first_block + -(-total // BLOCK))), encoded)


def test_prompts_of_one_length_are_one_batch() -> None:
    (batch,) = encoder_batches((fresh(2, 1), going_on(5, 1), fresh(2, 1)))
    assert batch.rows.tolist() == [[0, 1], [4, 5]]
    assert batch.mask.all()


def test_a_step_without_new_prompts_encodes_nothing() -> None:
    assert encoder_batches((going_on(5, 1),)) == ()


def test_padding_repeats_the_prompts_first_row() -> None:
    (batch,) = encoder_batches((fresh(2, 1), fresh(3, 1)))
    assert batch.rows.tolist() == [[0, 1, 0], [3, 4, 5]]
    assert batch.mask.tolist() == [[True, True, False], [True, True, True]]


def test_prompts_too_different_for_one_batch_are_two() -> None:
    assert [batch.rows.shape for batch in encoder_batches((fresh(40, 1), fresh(2, 1)))] == [(1, 2), (1, 40)]


def test_decodes_of_different_lengths_are_one_batch_padded_on_the_left() -> None:
    # Encoder's tokens are at places 0 to 2 of blocks from 0 on, and 0 to 3 of those from 5 on.
    (batch,) = decoder_batches((going_on(3, 1), going_on(4, 2, first_block=5)), BLOCK, ALL)
    assert batch.fresh is None
    assert batch.places.tolist() == [[0, 1, 2, 0], [20, 21, 22, 23]]
    assert batch.mask.tolist() == [[True, True, True, False], [True] * 4]
    assert (batch.own.rows.tolist(), batch.own.new, batch.own.past) == ([0, 1], 1, 2)
    assert batch.own.written.tolist() == [4, 26]
    assert batch.own.gathered.tolist() == [3, 3, 4, 24, 25, 26]
    assert batch.own.mask.tolist() == [[0, 1, 1], [1, 1, 1]]


def test_new_prompts_are_apart_from_decodes_and_name_the_encoders_rows() -> None:
    old, new = decoder_batches((going_on(3, 1), fresh(2, 1, first_block=7)), BLOCK, ALL)
    assert old.fresh is None
    assert new.fresh is not None
    assert new.fresh.rows.tolist() == [[1, 2]]
    assert new.fresh.written.tolist() == [28, 29]
    assert new.own.rows.tolist() == [3]
    assert new.own.written.tolist() == [30]


spans = st.lists(
    st.one_of(
        st.builds(fresh, st.integers(1, 40), st.integers(1, 5)),
        st.builds(going_on, st.integers(1, 40), st.integers(1, 20)),
    ),
    min_size=1,
    max_size=8,
).map(tuple)


@settings(max_examples=60, deadline=None)
@given(spans)
def test_every_row_is_computed_once_within_the_planned_room(step: tuple[RowSpan, ...]) -> None:
    rows = sum(span.count for span in step)
    firsts = list(accumulate((span.count for span in step), initial=0))
    encoded = {
        row for first, s in zip(firsts, step, strict=False) if not s.start for row in range(first, first + s.encoded)
    }
    encoders, decoders = encoder_batches(step), decoder_batches(step, BLOCK, ALL)
    assert sorted(row for batch in encoders for row in batch.rows[batch.mask].tolist()) == sorted(encoded)
    assert sorted(row for batch in decoders for row in batch.own.rows.tolist()) == sorted(set(range(rows)) - encoded)
    assert all(batch.rows.numel() <= rows for batch in encoders)
    for batch in decoders:
        if batch.fresh is not None:
            assert batch.fresh.rows.numel() <= rows
            assert batch.fresh.rows.flatten()[batch.fresh.kept].tolist() == batch.fresh.rows[batch.mask].tolist()
            assert batch.fresh.written.tolist() == batch.places[batch.mask].tolist()
        held = int(batch.mask.sum()) + int(batch.own.mask.sum())
        assert batch.mask.numel() + batch.own.mask.numel() <= 2 * held
