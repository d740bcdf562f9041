"""Cutting nodes into groups, with worths that can be added up by hand."""

from __future__ import annotations

from placement.packing import Counts, Demand, Item, Packing, pack, tidy

ONE, TWO, FOUR = (1,), (2,), (4,)


def offered(nodes: list[Counts], items: list[Item]) -> dict[Counts, list[int]]:
    """Every item on every node with room for it."""
    return {node: [i for i, item in enumerate(items) if all(map(int.__le__, item.needs, node))] for node in set(nodes)}


def packed(nodes: list[Counts], items: list[Item], *demands: Demand, limit: int = 100) -> Packing:
    return pack(nodes, items, demands, offered(nodes, items), limit=limit)


def tidied(nodes: list[Counts], items: list[Item], *demands: Demand) -> Packing:
    return tidy(packed(nodes, items, *demands), nodes, items, demands, offered(nodes, items), limit=100)


def worths(*values: int) -> list[Item]:
    """Groups of 1, 2 and 4 GPUs for one model, each holding as many sequences as it has GPUs."""
    return [Item(0, needs, sum(needs), worth) for needs, worth in zip((ONE, TWO, FOUR), values, strict=False)]


def test_four_gpus_are_cut_as_it_pays() -> None:
    # 4 * 10 = 40, 2 * 21 = 42, 41.
    assert packed([FOUR], worths(10, 21, 41), Demand(1, 1)).nodes == ((1, 1),)
    assert packed([FOUR], worths(10, 19, 39), Demand(1, 1)).nodes == ((0, 0, 0, 0),)
    assert packed([FOUR], worths(10, 21, 43), Demand(1, 1)) == Packing(((2,),), (1, 43), True)


def test_what_pays_nothing_stays_idle() -> None:
    assert packed([FOUR], [Item(0, (3,), 1, 5)], Demand(1, 1)).nodes == ((0,),)
    assert packed([FOUR], [], Demand(1, 1)) == Packing(((),), (0, 0), True)
    # The fourth GPU adds nothing, so it is left alone.
    assert packed([FOUR], [Item(0, FOUR, 1, 7), Item(0, (3,), 1, 7)], Demand(1, 1)).nodes == ((1,),)


def test_groups_never_span_nodes() -> None:
    assert packed([ONE, ONE], worths(1, 100), Demand(1, 1)).nodes == ((0,), (0,))


def test_sequences_come_before_worth() -> None:
    # One large group is worth more, four small ones hold the 4 sequences that are asked for.
    items = [Item(0, ONE, 1, 5), Item(0, FOUR, 3, 100)]
    assert packed([FOUR], items, Demand(3, 1)).nodes == ((1,),)
    assert packed([FOUR], items, Demand(4, 1)).nodes == ((0, 0, 0, 0),)
    # More than there is: as many as can be had.
    assert packed([FOUR], items, Demand(40, 1)).state == (4, 20)


def test_models_are_balanced_by_their_shares() -> None:
    items = [Item(0, ONE, 1, 10), Item(1, ONE, 1, 10)]
    for share, expected in ((1, (0, 0, 1, 1)), (3, (0, 1, 1, 1))):
        assert tuple(sorted(packed([FOUR], items, Demand(1, 1), Demand(1, share)).nodes[0])) == expected


def test_each_kind_of_gpu_goes_where_it_is_needed() -> None:
    # Model 1 can use the second kind only; model 0 both, and would be better off with the second.
    items = [Item(0, (1, 0), 1, 5), Item(0, (0, 1), 1, 9), Item(1, (0, 1), 1, 6)]
    assert packed([(2, 2)], items, Demand(1, 1), Demand(1, 1)).nodes == ((0, 0, 2, 2),)
    assert packed([(2, 0), (0, 2)], items, Demand(1, 1), Demand(1, 1)).nodes == ((0, 0), (2, 2))


def test_nodes_that_are_alike_may_differ_in_what_they_run() -> None:
    items = [Item(0, TWO, 1, 10), Item(1, TWO, 1, 10)]
    found = packed([TWO] * 3, items, Demand(1, 2), Demand(1, 1))
    assert sorted(found.nodes) == [(0,), (0,), (1,)]


def test_a_set_beyond_its_limit_is_said() -> None:
    items = [Item(m, (1,), 1, 10 + m) for m in range(3)]
    demands = [Demand(1, 1)] * 3
    exact, rough = (packed([(8,)] * 2, items, *demands, limit=limit) for limit in (1000, 3))
    assert exact.exact
    assert not rough.exact
    # 16 GPUs, in groups of one: 10 * 6, 11 * 5 and 12 * 5, so 55 for the model that has least.
    assert min(exact.state[3:]) == 55
    assert 0 < min(rough.state[3:]) <= 55
    assert rough == packed([(8,)] * 2, items, *demands, limit=3)


def test_fewer_kinds_of_group_for_a_little_worth() -> None:
    # Eight GPUs: 2 + 3 + 3 is worth 207 + 2 * 311 = 829, 2 + 2 + 2 + 2 is worth 828.
    items = [Item(0, TWO, 1, 207), Item(0, (3,), 1, 311)]
    assert packed([(8,)], items, Demand(1, 1)).nodes == ((0, 1, 1),)
    assert tidied([(8,)], items, Demand(1, 1)) == Packing(((0, 0, 0, 0),), (1, 828), True)


def test_not_for_more_than_three_per_cent() -> None:
    # 200 + 2 * 320 = 840 against 4 * 200 = 800.
    items = [Item(0, TWO, 1, 200), Item(0, (3,), 1, 320)]
    assert tidied([(8,)], items, Demand(1, 1)) == packed([(8,)], items, Demand(1, 1))


def test_not_for_a_sequence_that_is_asked_for() -> None:
    # 2 + 3 + 3 holds 5 sequences, 2 + 2 + 2 + 2 holds 4.
    items = [Item(0, TWO, 1, 207), Item(0, (3,), 2, 311)]
    assert tidied([(8,)], items, Demand(4, 1)).nodes == ((0, 0, 0, 0),)
    assert tidied([(8,)], items, Demand(5, 1)).nodes == ((0, 1, 1),)
