"""The token history: written by cache slot, read by block table, and tables that are sent only when they change."""

from __future__ import annotations

import torch

from deployments.engine.history import BlockTables, TokenHistory

CPU = torch.device("cpu")


def test_bytes_are_four_per_token_and_one_block_of_scratch() -> None:
    assert TokenHistory(10, 16, CPU).bytes == 4 * 16 * (10 + 1)


def test_is_read_by_table_whatever_the_order_of_blocks() -> None:
    history = TokenHistory(4, 2, CPU)
    history.note(torch.tensor([7, 8, 9]), torch.tensor([6, 7, 2]))  # block 3, then block 1
    got = history.gather(torch.tensor([[3, 1], [1, 3]], dtype=torch.int32))
    assert got.dtype == torch.int64
    assert got.tolist() == [[7, 8, 9, 0], [9, 0, 7, 8]]


def test_a_block_written_again_forgets() -> None:
    history = TokenHistory(1, 2, CPU)
    history.note(torch.tensor([7, 8]), torch.tensor([0, 1]))
    history.note(torch.tensor([5], dtype=torch.int32), torch.tensor([1]))
    assert history.gather(torch.tensor([[0]], dtype=torch.int32)).tolist() == [[7, 5]]


def test_padding_goes_to_the_scratch_block() -> None:
    history = TokenHistory(1, 2, CPU)
    history.note(torch.tensor([9, 9, 9]), torch.tensor([2, 2, 2]))
    assert history.gather(torch.tensor([[0]], dtype=torch.int32)).tolist() == [[0, 0]]


class TestBlockTables:
    def test_are_sent_when_one_has_changed(self) -> None:
        tables = BlockTables(2)
        first = tables.update([(4,), (2, 3)])
        assert first is not None
        assert first.tolist() == [[4, 0], [2, 3]]
        assert tables.update([(4,), (2, 3)]) is None
        grown = tables.update([(4, 5), (2, 3)])
        assert grown is not None
        assert grown.tolist() == [[4, 5], [2, 3]]

    def test_widen_by_doubling_and_keep_what_is_known(self) -> None:
        tables = BlockTables(2)
        tables.update([(1, 2), (3,)])
        wide = tables.update([(1, 2, 5), (3,)])
        assert wide is not None
        assert wide.tolist() == [[1, 2, 5, 0], [3, 0, 0, 0]]

    def test_a_recomputed_sequence_has_new_blocks(self) -> None:
        tables = BlockTables(1)
        tables.update([(1, 2, 3)])
        moved = tables.update([(7, 8)])
        assert moved is not None
        assert moved[0, :2].tolist() == [7, 8]
