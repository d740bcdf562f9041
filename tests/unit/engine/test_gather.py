"""The gather cache: how a step becomes batches, and what one layer of a batch reads and writes."""

from __future__ import annotations

import pytest
import torch

from deployments.engine.attention import PagedKv, RowSpan, StepLayout, UnsupportedAttention
from deployments.engine.gather import GatherAttention, GatherLayer, group_spans, make_batch
from placement.gathered import Bound

CPU = torch.device("cpu")
BLOCK = 4


def span(start: int, count: int, first_block: int = 0) -> RowSpan:
    """Blocks in a row from `first_block` on."""
    blocks = -(-(start + count) // BLOCK)
    return RowSpan(start, count, tuple(range(first_block, first_block + blocks)))


def groups(*spans: RowSpan, limit: int = 1000, pairs: int = 10**6) -> list[list[int]]:
    return [[first for first, _ in group] for group in group_spans(spans, limit, of_pairs(pairs))]


def of_pairs(most: int) -> Bound:
    """A forward's bound where gathering costs nothing."""
    return Bound(token_bytes=0, pair_bytes=1, most=most)


def test_spans_of_equally_many_rows_share_a_batch() -> None:
    assert groups(span(9, 1), span(0, 5), span(10, 1), span(3, 5)) == [[0, 6], [1, 7]]


def test_a_batch_is_padded_to_twice_its_shortest_at_most() -> None:
    assert groups(span(19, 1), span(4, 1), span(9, 1)) == [[1, 2], [0]]


def test_a_batch_gathers_no_more_than_the_limit_unless_one_sequence_does() -> None:
    same = [span(9, 1)] * 5
    assert groups(*same, limit=20) == [[0, 1], [2, 3], [4]]
    assert groups(*same, limit=5) == [[0], [1], [2], [3], [4]]


def test_a_batch_scores_no_more_pairs_than_the_limit() -> None:
    assert groups(*[span(0, 4)] * 5, pairs=32) == [[0, 4], [8, 12], [16]]
    assert groups(*[span(9, 1)] * 5, pairs=20) == [[0, 1], [2, 3], [4]]
    assert groups(*[span(9, 1)] * 2, pairs=5) == [[0], [1]], "a row can't be divided"


def test_gathered_tokens_and_pairs_share_one_bound() -> None:
    # Of 10 tokens each: one row costs 10 * (3 + 1), ten rows 10 * (3 + 10 * 1); they are divided into fives.
    bound = Bound(token_bytes=3, pair_bytes=1, most=80)
    assert (bound.tokens(1), bound.tokens(10)) == (20, 6)
    together = [[first for first, _ in group] for group in group_spans([span(9, 1)] * 3, 1000, bound)]
    assert together == [[0, 1], [2]]
    parts = [[(part.start, part.count) for _, part in group] for group in group_spans([span(0, 10)], 1000, bound)]
    assert parts == [[(0, 5)], [(5, 5)]]


def test_long_spans_are_divided_and_their_parts_run_in_order() -> None:
    """Ten rows in parts of 5, 3 and 2, and another span of 3 rows that joins the second of these at the earliest."""
    found = list(group_spans((span(0, 3), span(0, 10, 1)), 1000, of_pairs(25)))
    parts = [[(first, part.start, part.count) for first, part in group] for group in found]
    assert parts == [[(0, 0, 3)], [(3, 0, 5)], [(8, 5, 3)], [(11, 8, 2)]]
    assert {part.block_table for group in found[1:] for _, part in group} == {(1, 2, 3)}


@pytest.mark.parametrize("pairs", [1, 7, 50, 400])
def test_division_loses_no_row_and_keeps_to_the_limit(pairs: int) -> None:
    spans = (span(5, 7), span(0, 20), span(30, 1), span(2, 7))
    seen: dict[int, int] = {}
    for group in group_spans(spans, 40, of_pairs(pairs)):
        longest = max(part.start + part.count for _, part in group)
        count = group[0][1].count
        assert len(group) == 1 or (longest * len(group) <= 40 and count * longest * len(group) <= pairs)
        assert count == 1 or count * longest <= pairs
        for first, part in group:
            for row in range(part.count):
                assert first + row not in seen
                seen[first + row] = part.start + row
    starts = [position for each in spans for position in range(each.start, each.start + each.count)]
    assert [seen[row] for row in range(35)] == starts


@pytest.mark.parametrize(
    "spans",
    [
        [RowSpan(14 + i % 2, 1, (0, 1, 2, 3 + i)) for i in range(6)],
        [RowSpan(14, 1, (0, 1, 2, 3)), *(RowSpan(7, 1, (4 + 2 * i, 5 + 2 * i)) for i in range(2))],
    ],
    ids=["a shared prefix", "padding"],
)
def test_a_forward_gathers_no_more_than_the_blocks_hold(spans: list[RowSpan]) -> None:
    """The plan keeps room for no more; here all sequences together would gather more than nine blocks."""
    blocks = 9
    assert {block for each in spans for block in each.block_table} <= set(range(blocks))
    attention = GatherAttention(blocks, CPU, of_pairs(10**6))
    attention.prepare(StepLayout(tuple(spans), BLOCK))
    gathered = [len(batch.gathered) for batch in attention._batches]
    assert len(spans) * (max(each.start for each in spans) + 1) > blocks * BLOCK
    assert max(gathered) <= blocks * BLOCK
    assert sum(batch.mask.sum().item() for batch in attention._batches) == sum(each.start + 1 for each in spans)
    assert len(gathered) < len(spans), "they still share forwards"


def test_spans_without_rows_are_in_no_batch() -> None:
    assert groups(RowSpan(0, 0, ()), span(2, 1), RowSpan(0, 0, ())) == [[0]]


def test_a_batch_is_padded_on_the_left_with_the_sequence_s_own_first_token() -> None:
    batch = make_batch([(3, RowSpan(2, 2, (7,))), (5, RowSpan(4, 2, (1, 2)))], BLOCK, CPU)
    assert (batch.new, batch.past) == (2, 4)
    assert batch.rows.tolist() == [3, 4, 5, 6]
    assert batch.written.tolist() == [30, 31, 8, 9]
    assert batch.gathered.view(2, -1).tolist() == [[28, 28, 28, 29, 30, 31], [4, 5, 6, 7, 8, 9]]
    assert batch.mask.tolist() == [[0, 0, 1, 1, 1, 1], [1] * 6]


def layer(kv_heads: int, head_dim: int, *, dtype: torch.dtype = torch.float32, latent: bool = False) -> GatherLayer:
    """Over 8 blocks, for a prefill of 3 tokens in blocks 5 and 2."""
    kv = PagedKv(8, BLOCK, kv_heads, head_dim, dtype, CPU, latent=latent)
    return GatherLayer(kv, make_batch([(0, RowSpan(2, 3, (5, 2)))], BLOCK, CPU))


def rows(heads: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, heads, 3, size, generator=torch.Generator().manual_seed(seed))


def test_what_is_written_is_read_behind_what_was_there() -> None:
    cache = layer(2, 8)
    assert cache.kv is not None
    cache.kv.keys[5, 0], cache.kv.keys[5, 1] = 1.0, 2.0
    keys, values = cache.update(rows(2, 8), rows(2, 8, 1))
    assert torch.equal(keys[0, :, 2:], rows(2, 8)[0])
    assert torch.equal(values[0, :, 2:], rows(2, 8, 1)[0])
    assert keys[0, :, :2, 0].tolist() == [[1.0, 2.0], [1.0, 2.0]]
    assert torch.equal(cache.kv.keys[2, 0], rows(2, 8)[0, :, 2]), "the fifth token is the first of the second block"
    assert not cache.kv.keys[[0, 1, 3, 4, 6, 7, 8]].any(), "nothing else is written"


def test_keys_repeated_for_query_heads_are_stored_once() -> None:
    cache = layer(2, 8)
    repeated = rows(2, 8).repeat_interleave(3, dim=1)
    keys, _ = cache.update(repeated, repeated)
    assert torch.equal(keys[:, :, 2:], repeated)


def test_heads_are_stored_with_zeros_behind_them() -> None:
    """Where a plan counted on FlashInfer."""
    cache = layer(2, 8)
    assert cache.kv is not None
    keys, values = cache.update(rows(2, 5), rows(2, 5, 1))
    assert (keys.shape, values.shape) == ((1, 2, 5, 5), (1, 2, 5, 5))
    assert torch.equal(keys[:, :, 2:], rows(2, 5))
    assert torch.equal(values[:, :, 2:], rows(2, 5, 1))
    assert not cache.kv.keys[..., 5:].any()


def test_a_latent_is_one_vector() -> None:
    cache = layer(1, 24, latent=True)
    assert cache.kv is not None
    assert cache.kv.bytes == 9 * BLOCK * 24 * 4
    latent, rope = cache.update(rows(1, 16), rows(1, 8, 1))
    assert torch.equal(latent[:, :, 2:], rows(1, 16))
    assert torch.equal(rope[:, :, 2:], rows(1, 8, 1))


def test_fp8_saturates_and_comes_back_in_the_compute_dtype() -> None:
    cache = layer(2, 8, dtype=torch.float8_e4m3fn)
    keys, _ = cache.update(1e6 * torch.ones(1, 2, 3, 8), torch.zeros(1, 2, 3, 8))
    assert keys.dtype == torch.float32
    assert keys[0, :, 2:].unique().tolist() == [448.0]


@pytest.mark.parametrize(("heads", "size"), [(3, 8), (2, 16)])
def test_other_shapes_than_planned_are_refused(heads: int, size: int) -> None:
    cache = layer(2, 8)
    with pytest.raises(UnsupportedAttention, match=f"caches {heads} heads of size {size}, .* promises 2 of 8"):
        cache.update(rows(heads, size), rows(heads, size))


def test_a_layer_of_another_stage_has_lengths_alone() -> None:
    other = GatherLayer(None, make_batch([(0, span(5, 2))], BLOCK, CPU))
    assert (other.get_seq_length(), other.get_mask_sizes(2), other.get_max_length()) == (5, (7, 0), -1)
    with pytest.raises(UnsupportedAttention, match="another stage"):
        other.update(rows(2, 8), rows(2, 8))


def test_a_step_comes_back_in_row_order() -> None:
    """The forward adds what it is given: an id, a position, the batch it came in, what it may see."""

    def forward(source: torch.Tensor, positions: torch.Tensor, **options: torch.Tensor) -> torch.Tensor:
        visible = options["attention_mask"].sum(-1)[:, None]
        return torch.stack((source, positions, visible.expand_as(source)), -1).float()

    attention = GatherAttention(30, CPU, of_pairs(10**6))
    attention.prepare(StepLayout((span(9, 1), span(0, 3, 4), span(10, 1, 8)), BLOCK))
    ids, positions = torch.tensor([[50, 60, 61, 62, 70]]), torch.tensor([[9, 0, 1, 2, 10]])
    out = attention.run(forward, ids, positions, {2: PagedKv(30, BLOCK, 1, 8, torch.float32, CPU)})
    assert out.tolist() == [[[50, 9, 10], [60, 0, 3], [61, 1, 3], [62, 2, 3], [70, 10, 11]]]
    assert attention.runs == 2
